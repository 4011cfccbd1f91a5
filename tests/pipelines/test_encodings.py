"""The encoding of a CSV is guessed from its letters: in each language the texts read as they were written."""

import pytest

from pipelines.ingest.sources import delimited
from tests.pipelines.test_sources import as_csv, look, read

SENTENCES = {
    "fr": (("cp1252",), [
        "Le dîner était très bon, déjà à la première bouchée",
        "Une soirée agréable, le garçon était très attentionné",
        "Où est passée la crème brûlée ? Ça ne m'a pas plu",
        "Les pâtes étaient trop cuites et le café était froid",
        "Un hôtel bien situé, près de la forêt et du château",
        "Nous avons goûté le gâteau à l'orange, délicieux",
        "L'été dernier, la plage était noyée de monde",
        "Très déçu par ce téléphone, la batterie lâche vite",
        "Cœur de bœuf et œufs frais, un régal",
        "Qualité médiocre, je l'ai renvoyé aussitôt",
        "Maïs soufflé et canoë : un séjour naïf mais drôle",
        "Le spectacle a commencé à l'heure, bravo à l'équipe",
    ]),
    "es": (("cp1252",), [
        "El niño comió piñas en España",
        "La habitación era pequeña pero muy cómoda",
        "¿Cuánto tiempo tardó el envío? ¡Demasiado!",
        "Mi mamá compró un teléfono que no funcionó",
        "El camión llegó mañana y tarde, qué lástima",
        "Está muy rico, volveré el próximo año",
        "La película fue aburrida, me dormí a la mitad",
        "El vendedor no contestó ningún mensaje",
        "Un pingüino de juguete muy simpático",
        "Excelente atención y rápida entrega, gracias señor",
        "Las niñas están contentas con el regalo",
        "No sirve, se rompió al día siguiente",
    ]),
    "pt": (("cp1252",), [
        "Não gostei da refeição, o pão estava duro",
        "A entrega foi rápida e o atendimento ótimo",
        "Você não vai acreditar como é bom este café",
        "O avião atrasou três horas, que situação",
        "Produção de maçãs e limões no verão",
        "Coração partido, história emocionante",
        "A criança não dormiu à noite com o barulho",
        "É um livro sobre a língua portuguesa e os avós",
    ]),
    "de": (("cp1252",), [
        "Das Essen war süß und die Bedienung sehr freundlich",
        "Schöne Grüße aus München, wir kommen wieder",
        "Der Käse schmeckt wie früher bei meiner Großmutter",
        "Die Tür schließt nicht, völlig unbrauchbar",
        "Wir haben fünf Äpfel und zwölf Brötchen gekauft",
        "Für diesen Preis kann man nichts Besseres erwarten, möglicherweise",
        "Ein Märchen über große Träume",
        "Überraschend günstig und ganz ordentlich gefüllt",
    ]),
    "da": (("cp1252",), [
        "Maden var kold, og vi måtte vente længe på bordet",
        "Jeg købte en blå cykel på Sjælland, smukt",
        "Rødgrød med fløde, så dejligt",
        "Kan ikke anbefale stedet, dårlig kvalitet og høj pris",
    ]),
    "pl": (("cp1250", "iso8859_2"), [
        "Zażółć gęślą jaźń, właśnie przyszła świeża książka",
        "Jedzenie było pyszne, a obsługa bardzo miła",
        "Niestety przesyłka dotarła uszkodzona i spóźniona",
        "Książka jest świetna, polecam każdemu czytelnikowi",
        "Pokój był mały, ale łóżko wygodne",
        "Nie mogę się doczekać następnej części",
        "Świeże pieczywo i dżem z czarnej porzeczki",
        "Zupa była zimna, więc już tu nie wrócę",
        "Wróciliśmy z gór później, niż planowaliśmy",
        "Słuchawki zepsuły się po dwóch tygodniach",
        "Piękny hotel nad morzem, cudowne śniadania",
        "Dziękuję za szybką wysyłkę, wszystko działa",
    ]),
    "cs": (("cp1250", "iso8859_2"), [
        "Příliš žluťoučký kůň úpěl ďábelské ódy",
        "Jídlo bylo výborné a obsluha velmi příjemná",
        "Kniha se mi líbila, určitě ji doporučuji",
        "Pokoj byl malý, ale čistý a útulný",
        "Bohužel přišlo poškozené zboží",
        "Děkuji za rychlé doručení, všechno funguje",
        "Sluchátka se rozbila po dvou týdnech",
        "Těším se na další díl, je to skvělé čtení",
        "Polévka byla studená a chléb tvrdý",
        "Hotel leží uprostřed města u řeky",
        "Koupili jsme švestky a třešně na trhu",
        "Nemůžu uvěřit, že je to tak levné",
    ]),
    "hu": (("cp1250",), [
        "Az étel nagyon finom volt, és a kiszolgálás gyors",
        "Árvíztűrő tükörfúrógép, jó vétel volt",
        "Nem működik, két nap után tönkrement a fülhallgató",
        "Köszönöm szépen, gyönyörű könyv, mindenkinek ajánlom",
        "Sajnos későn érkezett meg a csomag, és törött volt",
        "A szoba kicsi, de tiszta és kellemes",
        "Hűvös este volt, mégis a kertben ültünk",
    ]),
    "lt": (("cp1257",), [
        "Maistas buvo labai skanus, o aptarnavimas greitas, ačiū",
        "Knyga man patiko, rekomenduoju ją visiems žmonėms",
        "Deja, siuntinys atėjo pažeistas ir per vėlai",
        "Kambarys mažas, bet švarus ir jaukus, grįšime",
        "Ausinės sugedo po dviejų savaičių",
        "Ačiū už greitą pristatymą, viskas veikia puikiai",
        "Negaliu sulaukti kitos dalies, tai įdomi istorija",
        "Sriuba buvo šalta, o duona kieta, daugiau čia neisiu",
        "Viešbutis yra miesto centre prie upės, gražus vaizdas",
        "Pirkome slyvų ir vyšnių turguje",
        "Žąsų būrys nuskrido į pietus",
        "Šį vakarą žiūrėjome filmą apie jūrą",
    ]),
    "tr": (("cp1254",), [
        "Yemek çok lezzetliydi ve servis hızlıydı, teşekkürler",
        "Kitabı çok beğendim, herkese tavsiye ederim",
        "Maalesef kargo geç geldi ve kutu kırılmıştı",
        "Oda küçük ama temiz ve rahattı, yine geleceğiz",
        "Kulaklık iki hafta sonra bozuldu, ağladım",
        "Hızlı gönderi için teşekkür ederim, her şey çalışıyor",
        "Bir sonraki bölümü sabırsızlıkla bekliyorum",
        "Çorba soğuktu, bir daha gelmeyeceğim",
        "Otel şehir merkezinde, ırmağın yanında, İstanbul güzeldi",
        "Pazardan erik ve kiraz aldık, çok tatlıydı",
        "Bu kadar ucuz olduğuna inanamıyorum",
        "Şişeyi açtım ama içi boştu, üzüldüm",
    ]),
    "ru": (("cp1251",), [
        "Еда была очень вкусной, обслуживание быстрое",
        "Книга мне понравилась, всем рекомендую",
        "К сожалению, посылка пришла повреждённой",
        "Номер маленький, но чистый и уютный",
        "Наушники сломались через две недели",
        "Спасибо за быструю доставку, всё работает",
        "Жду не дождусь следующей части",
        "Суп был холодный, больше сюда не приду",
        "Гостиница в центре города, у реки",
        "Мы купили сливы и вишни на рынке",
        "Не могу поверить, что это так дёшево",
        "Объявление о съезде было вчера",
    ]),
    "el": (("cp1253",), [
        "Το φαγητό ήταν πολύ νόστιμο και η εξυπηρέτηση γρήγορη",
        "Το βιβλίο μου άρεσε, το συνιστώ σε όλους",
        "Δυστυχώς το δέμα ήρθε κατεστραμμένο",
        "Το δωμάτιο ήταν μικρό αλλά καθαρό",
        "Τα ακουστικά χάλασαν μετά από δύο εβδομάδες",
        "Ευχαριστώ για τη γρήγορη παράδοση",
        "Ανυπομονώ για το επόμενο μέρος",
        "Η σούπα ήταν κρύα, δεν θα ξαναέρθω",
        "Το ξενοδοχείο είναι στο κέντρο της πόλης",
        "Αγοράσαμε δαμάσκηνα και κεράσια",
        "Δεν μπορώ να πιστέψω πόσο φτηνό είναι",
        "Απόψε είδαμε μια ταινία για τη θάλασσα",
    ]),
    "ja": (("cp932", "euc_jp"), [
        "料理はとても美味しく、サービスも早かったです",
        "この本が気に入りました。みんなに勧めます",
        "残念ながら荷物は壊れて届きました",
        "部屋は小さいけれど清潔で快適でした",
        "イヤホンは二週間で壊れました",
        "早い配達をありがとうございます",
        "次の巻が待ちきれません",
        "スープは冷たかった、もう来ません",
        "ホテルは町の中心、川のそばにあります",
        "市場でプラムとさくらんぼを買いました",
        "こんなに安いとは信じられない",
        "今夜は海の映画を見ました",
    ]),
}  # fmt: skip
"""The encodings that programs write such texts in, and sentences of ordinary length."""
WESTERN = ("fr", "es", "pt", "de")
CASES = [(lang, encoding) for lang, (encodings, _) in SENTENCES.items() for encoding in encodings]


def rows_of(texts: list[str]) -> list[dict[str, str]]:
    return [{"user_id": f"u{n % 3}", "item_id": str(n), "text": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize(("lang", "encoding"), CASES)
def test_texts_of_a_language_read_as_they_were_written(tmp_path, lang, encoding):
    rows = rows_of(SENTENCES[lang][1])
    (tmp_path / "a.csv").write_bytes(as_csv(rows).encode(encoding))
    found, rejects = read(tmp_path / "a.csv")
    assert [row["text"] for row in found] == SENTENCES[lang][1] and not rejects
    assert "(a guess by the letters; --csv.encoding sets another)" in look(tmp_path / "a.csv", 3).form


@pytest.mark.parametrize("texts", [
    ["Le dîner était très bon, déjà à la première bouchée"], ["El niño comió piñas en España"],
    ["The café cost £5, it’s naïve"], [SENTENCES[lang][1][n] for n in range(8) for lang in WESTERN],
])  # fmt: skip
def test_short_and_mixed_western_texts_are_cp1252(tmp_path, texts):
    (tmp_path / "a.csv").write_bytes(as_csv(rows_of(texts)).encode("cp1252"))
    assert [row["text"] for row in read(tmp_path / "a.csv")[0]] == texts
    assert ", encoding cp1252 (a guess" in look(tmp_path / "a.csv", 3).form


@pytest.mark.parametrize(("lang", "encoding"), [("fi", "mac_roman"), ("fr", "mac_roman"), ("es", "cp850")])
def test_texts_of_the_mac_and_of_dos_are_not_taken_for_those_of_windows(lang, encoding):
    """charset_normalizer decides on them instead."""
    texts = {
        "fi": ["Hyvä tuote ja nopea toimitus, tämä on äärettömän hyvä", "Pidän tästä, mutta väri on väärä"],
        "fr": ["C’est très bon, déjà à la première bouchée", "L’été dernier, la plage était noyée de monde"],
        "es": ["Atención rápida", "Llegó rápido y está muy rico, qué lástima", "El camión llegó tarde"],
    }[lang]  # fmt: skip
    assert delimited._latin("\n".join(texts).encode(encoding)) is None
    assert delimited._latin("\n".join(texts).encode("cp1252")) == "cp1252"


def test_what_is_certain_or_given_is_no_guess(tmp_path):
    rows = rows_of(SENTENCES["fr"][1])
    (tmp_path / "u.csv").write_bytes(as_csv(rows).encode())
    assert look(tmp_path / "u.csv", 3).form.endswith(", encoding utf-8")
    (tmp_path / "l.csv").write_bytes(as_csv(rows).encode("cp1252"))
    assert look(tmp_path / "l.csv", 3, csv={"encoding": "cp1252"}).form.endswith(", encoding cp1252")
