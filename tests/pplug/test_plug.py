"""The plug against a plain per-user loop written from the equations; its folder; the authors' checkpoints."""

import math

import pytest
import torch
from safetensors.torch import load_file

from pplug import PersonaPlug, PlugConfig
from pplug.plug import plug_id
from pplug.plug_parts import segment_softmax
from tests.pplug.models import tiny_bert

D, H, P = 8, 6, 3


def unit(*shape: int, seed: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values / values.norm(dim=-1, keepdim=True)


def made(seed: int = 0, **more: object) -> PersonaPlug:
    torch.manual_seed(seed)
    settings = {"encoder_dim": D, "llm_dim": H, "persona_tokens": P, "persona_scale": 1.7, "instruction_scale": 0.6}
    return PersonaPlug(PlugConfig(**(settings | more)))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def by_hand(
    plug: PersonaPlug, items: torch.Tensor, query: torch.Tensor | None, temperature: float = 1.0
) -> torch.Tensor:
    """Equations of the paper for one user, item by item, the projector on every item."""
    w = {name: tensor.detach() for name, tensor in plug.state_dict().items()}

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        hidden = gelu(w[f"{name}.0.weight"] @ x + w[f"{name}.0.bias"])
        return w[f"{name}.2.weight"] @ hidden + w[f"{name}.2.bias"]

    instruction = plug.config.instruction_scale * mlp("align_mlp_inst", w["inst_token"][0])
    if not len(items):
        return torch.cat([instruction[None], torch.zeros(P, H)])
    if query is None:
        weights = [1 / len(items)] * len(items)
    else:
        exp = [math.exp(float(query @ item) / temperature) for item in items]
        weights = [e / sum(exp) for e in exp]
    persona = sum(weight * mlp("align_mlp", item) for weight, item in zip(weights, items, strict=True))
    return torch.cat([instruction[None], plug.config.persona_scale * persona.view(P, H)])


@pytest.mark.parametrize("aggregation", ["attention", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_batch_equals_the_equations_user_by_user(aggregation, temperature):
    plug = made(aggregation=aggregation, temperature=temperature)
    items, query = unit(4, 5, D, seed=1), unit(4, D, seed=2)
    sizes = [5, 0, 1, 3]
    mask = torch.arange(5)[None] < torch.tensor(sizes)[:, None]
    got = plug(items, mask, query)
    assert got.shape == (4, 1 + P, H)
    for user, n in enumerate(sizes):
        want = by_hand(plug, items[user, :n], query[user] if aggregation == "attention" else None, temperature)
        torch.testing.assert_close(got[user], want, rtol=1e-4, atol=1e-5)


def test_user_without_items_gets_zeros_and_garbage_in_padding_changes_nothing():
    plug = made()
    items, query = unit(2, 4, D, seed=3), unit(2, D, seed=4)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    clean = plug(items, mask, query)
    items[~mask] = torch.nan
    dirty = plug(items, mask, query)
    assert torch.equal(clean, dirty)
    assert torch.equal(clean[1, 1:], torch.zeros(P, H))


def test_hoisted_projector_equals_the_projector_on_every_item():
    plug = made()
    items, query = unit(1, 7, D, seed=5), unit(1, D, seed=6)
    projected = plug.align_mlp(items[0])  # (7, P*H): as the paper writes it
    weights = torch.softmax(items[0] @ query[0], dim=0)
    want = plug.config.persona_scale * (weights @ projected).view(P, H)
    got = plug(items, torch.ones(1, 7, dtype=torch.bool), query)[0, 1:]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_batch_mates_change_nothing():
    plug = made()
    items, query = unit(3, 4, D, seed=7), unit(3, D, seed=8)
    mask = torch.ones(3, 4, dtype=torch.bool)
    alone = plug(items[:1], mask[:1], query[:1])
    torch.testing.assert_close(plug(items, mask, query)[:1], alone, rtol=1e-6, atol=1e-6)


def test_every_parameter_has_a_gradient_even_when_no_user_has_history():
    plug = made()
    plug(torch.zeros(2, 1, D), torch.zeros(2, 1, dtype=torch.bool), unit(2, D, seed=9)).sum().backward()
    assert all(parameter.grad is not None for parameter in plug.parameters())


def test_segment_softmax_survives_large_scores():
    got = segment_softmax(torch.tensor([1000.0, 999.0, -1000.0]), torch.tensor([0, 0, 1]), 3)
    torch.testing.assert_close(got, torch.tensor([1 / (1 + math.exp(-1)), 1 - 1 / (1 + math.exp(-1)), 1.0]))


@pytest.mark.parametrize("what", ["items", "query"])
def test_another_width_is_refused_with_both_numbers(what):
    plug = made()
    items = torch.zeros(1, 1, D + (what == "items"))
    query = torch.zeros(1, D + (what == "query"))
    with pytest.raises(ValueError, match=rf"{what} have width {D + 1}, but the plug was made for width {D}"):
        plug(items, torch.ones(1, 1, dtype=torch.bool), query)


def test_folder_gives_the_same_plug_back(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = tiny_bert(tmp_path / "encoder", dim=D)
    plug = PersonaPlug(made().config, AutoModel.from_pretrained(folder)).eval()
    plug.save_pretrained(tmp_path / "plug", AutoTokenizer.from_pretrained(folder))
    again = PersonaPlug.from_pretrained(tmp_path / "plug")
    items, query = unit(1, 4, D, seed=1), torch.tensor([[1, 5, 6]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        x, y = (p.embed_query(query, torch.ones_like(query)) for p in (plug, again))
        assert torch.equal(x, y)
        assert torch.equal(plug(items, mask, x), again(items, mask, y))
    light = PersonaPlug.from_pretrained(tmp_path / "plug", queries=False)
    assert light.emb_model is None and torch.equal(plug(items, mask, None), light(items, mask, None))
    assert again.config == plug.config
    assert not list((tmp_path / "plug").rglob("*.bin")) + list((tmp_path / "plug").rglob("*.pt"))


def test_plug_id_changes_with_a_weight_and_not_with_the_place(tmp_path):
    plug = made().eval()
    first = plug_id(plug.save_pretrained(tmp_path / "a"))
    assert plug_id(plug.save_pretrained(tmp_path / "elsewhere")) == first
    with torch.no_grad():
        plug.inst_token[0, 0] += 1
    assert plug_id(plug.save_pretrained(tmp_path / "c")) != first


def test_a_folder_that_is_no_plug_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json; expected a plug folder"):
        PersonaPlug.from_pretrained(tmp_path)
    made().save_pretrained(tmp_path)
    config = made(llm_dim=H + 1).config
    (tmp_path / "config.json").write_text(config.model_dump_json())
    with pytest.raises(ValueError, match="do not fit config.json"):
        PersonaPlug.from_pretrained(tmp_path)


def test_a_config_is_read_without_a_matrix_and_damage_is_told_as_before(tmp_path, monkeypatch):
    from transformers import AutoModel

    def no_matrix(*given):
        raise AssertionError("the weights are not needed")

    encoder = AutoModel.from_pretrained(tiny_bert(tmp_path / "encoder", dim=D))
    plug = PersonaPlug(made(center="users").config, encoder)
    folder = plug.save_pretrained(tmp_path / "plug")
    text, weights = (folder / "config.json").read_text(), folder / "model.safetensors"
    monkeypatch.setattr("pplug.plug.load_file", no_matrix)
    monkeypatch.setattr(
        "torch.nn.init.kaiming_uniform_", lambda tensor, *given, **more: devices.add(tensor.device.type)
    )
    devices: set[str] = set()
    assert PersonaPlug.config_of(folder) == plug.config
    assert devices == {"meta"}, "matrices were filled"
    (folder / "config.json").write_text(text.replace(f'"llm_dim": {H}', f'"llm_dim": {H + 1}'))
    with pytest.raises(ValueError, match=r"do not fit config.json: (?s:.*)size mismatch for align_mlp.2.weight"):
        PersonaPlug.config_of(folder)
    (folder / "config.json").write_text(text.replace('"center": "users"', '"center": "none"'))
    with pytest.raises(ValueError, match=r"do not fit config.json: (?s:.*)Unexpected key"):
        PersonaPlug.config_of(folder)
    (folder / "config.json").write_text(text)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"plug: the weights do not fit config.json: .*not fully covered"):
        PersonaPlug.config_of(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors; expected a plug folder"):
        PersonaPlug.config_of(folder)


# --- checkpoints of the authors' code ----------------------------------------------------------------------------


def official_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the authors' keys, P = 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"inst_token": (1, D)}
    for part in ("align_mlp_inst", "align_mlp"):
        shapes |= {
            f"{part}.0.weight": (H, D),
            f"{part}.0.bias": (H,),
            f"{part}.2.weight": (H, H),
            f"{part}.2.bias": (H,),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_from_official_computes_what_the_authors_code_computes():
    state = official_state()
    plug = PersonaPlug.from_official(state)
    items, query = unit(1, 3, D, seed=1), unit(1, D, seed=2)

    def mlp(part, x):
        return (
            state[f"{part}.2.weight"] @ gelu(state[f"{part}.0.weight"] @ x + state[f"{part}.0.bias"])
            + state[f"{part}.2.bias"]
        )

    weights = torch.softmax(torch.stack([query[0] @ item for item in items[0]]), dim=0)
    persona = 539.9738 * sum(w * mlp("align_mlp", item) for w, item in zip(weights, items[0], strict=True))
    instruction = mlp("align_mlp_inst", state["inst_token"][0]) / 7.0 * 539.9738
    got = plug(items, torch.ones(1, 3, dtype=torch.bool), query)[0]
    torch.testing.assert_close(got[0], instruction, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(got[1], persona, rtol=1e-4, atol=1e-2)


def test_from_official_loads_the_query_encoder_where_one_is_given(tmp_path):
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(tiny_bert(tmp_path / "a", dim=D, seed=1))
    other = AutoModel.from_pretrained(tiny_bert(tmp_path / "b", dim=D, seed=2))
    state = official_state() | {f"emb_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    plug = PersonaPlug.from_official(state, query_encoder=other)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(plug.emb_model.state_dict()[name], tensor)
    assert PersonaPlug.from_official(state).emb_model is None


def test_from_official_reads_queries_as_the_authors_code_and_says_what_it_is_for(tmp_path):
    plug = PersonaPlug.from_official(official_state(), encoder_id="bge", llm_id="flan")
    kept = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path / "plug")).config
    assert kept.query_prefix == "Represent this sentence for searching relevant passages:"
    assert (kept.encoder_id, kept.llm_id) == ("bge", "flan")


def test_from_official_names_missing_keys():
    state = official_state()
    del state["align_mlp.2.bias"]
    with pytest.raises(ValueError, match=r"missing \['align_mlp.2.bias'\]"):
        PersonaPlug.from_official(state)


def test_no_llm_weights_inside(tmp_path):
    made().save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(official_state())
