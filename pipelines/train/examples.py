"""Items of a user's history in the prompts of a training: what retrieval finds among those that a request may see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from infra.errors import InputError
from pipelines.train.config import Config
from pplug import retrieval
from pplug.identity import model_folder
from pplug.llm import LLMConfig, is_encoder_decoder, tokenizer_of
from pplug.plain_text import TextTokenizer
from pplug.retrieval import Composed, InTraining, ShownItems
from pplug.splice import PromptBuilder
from pplug.tasks import TaskSpec


@dataclass(frozen=True)
class Examples:
    """Puts items before a request as `generate` does for the method of this retrieval."""

    retrieve: InTraining
    shown: ShownItems
    task: TaskSpec
    llm: LLMConfig

    def tokenizer(self) -> TextTokenizer:
        """The LLM's tokenizer. Raises ValueError: it cannot be loaded."""
        return _tokenizer(self.llm.model_dump_json())

    def before(self, items: Sequence[Mapping[str, str]], input: str, tokenizer: TextTokenizer) -> Composed:
        """The text of a request's prompt.

        Args:
            items: fields of those that the request may see, oldest first.
            tokenizer: the LLM's.

        Raises:
            ValueError: an item lacks a field that it is searched or shown by.
        """
        limit = self.llm.layout.max_input_tokens
        return retrieval.before(self.retrieve, items, input, self.task, tokenizer, limit, self.shown)


@lru_cache(maxsize=1)
def _tokenizer(llm: str) -> TextTokenizer:
    """The tokenizer of an LLM whose config is given as JSON; a process that prepares many buckets reads it once."""
    config = LLMConfig.model_validate_json(llm)
    folder = model_folder(config.model, config.revision, weights=False)
    return PromptBuilder(tokenizer_of(config), config.layout, is_encoder_decoder(folder)).words


def examples(config: Config, task: TaskSpec) -> Examples | None:
    """The examples that the config asks for; None: none.

    Raises:
        InputError: the task does not say how an item stands in a prompt, or there is no room for items.
    """
    if config.retrieve == "none":
        return None
    if task.retrieval is None:
        raise InputError(
            f"retrieve={config.retrieve}: task {task.name} does not say how items stand in a prompt; leave it out, or "
            "give a task entry with `retrieval` (--task FILE)"
        )
    try:
        config.retrieval.room(config.llm.layout.max_input_tokens)
    except ValueError as error:
        raise InputError(f"retrieval.{error}") from error
    return Examples(config.retrieve, config.retrieval, task, config.llm)
