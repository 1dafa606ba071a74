"""What people put beside the road: driving side, line paint, signs, plates, poles, bollards, by country code.

Driving side, script and, for the major countries, line paint are the real ones; everything else is drawn from a
stable hash of the ISO 3166-1 alpha-2 code, so that a country always looks like itself. Not a law book: it only has to
be the same in every panorama of a country.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["LEFT_DRIVING", "Country", "country", "stable_random"]

Colour = tuple[int, int, int]


def _codes(text: str) -> frozenset[str]:
    """The country codes of a text."""
    return frozenset(text.split())


LEFT_DRIVING = _codes(
    "GB IE IM JE GG MT CY AU NZ JP TH MY SG ID BN TL PG FJ SB TO WS TV KI NR NU CK TK NF CC CX PN FK SH IN PK BD LK "
    "NP BT MV HK MO ZA NA BW ZW ZM MW MZ TZ KE UG LS SZ MU SC JM BS BB TT GD LC VC AG KN DM GY SR AI BM KY MS TC VG "
    "VI IO GS"
)

_SCRIPTS = {
    "cyrillic": "RU UA BY BG RS MK KZ KG MN TJ",
    "greek": "GR CY",
    "arabic": "MA DZ TN LY EG SD SA YE OM AE QA KW BH IQ SY JO LB PS MR IR AF PK MV",
    "hebrew": "IL",
    "caucasian": "AM GE",
    "devanagari": "IN NP BD",
    "southeast": "TH LA KH MM LK",
    "han": "CN TW HK MO",
    "kana": "JP",
    "hangul": "KR KP",
    "ethiopic": "ET ER",
    "tibetan": "BT",
}

WHITE: Colour = (236, 236, 232)
YELLOW: Colour = (244, 190, 32)
_YELLOW_CENTRE = _codes(
    "US CA MX GT HN SV NI CR PA CU DO PR CO VE EC PE BO BR PY UY AR KR CN TW TH NO KE PH HK GU JM NG GH SA"
)
_YELLOW_EDGE = _codes("ZA NA BW ZW LS SZ IE IL MZ ZM")
_NO_EDGE = _codes("JP IN BD NP MM LA KH VN ET NG CD MG ML NE TD UG TZ PK AF HT AO SD")
_DASHED_EDGE = _codes("SE IE DK NO FI ES PT")
_SOLID_CENTRE = _codes("US CA KR CN TW CO PE BR JP")

_BOARDS: tuple[Colour, ...] = (
    (0, 104, 62), (0, 82, 165), (244, 244, 240), (250, 200, 20), (150, 24, 32), (30, 34, 46), (240, 120, 20),
    (0, 140, 150), (110, 50, 130), (196, 226, 240),
)  # fmt: skip
_ACCENTS: tuple[Colour, ...] = (
    (220, 30, 40), (250, 208, 30), (20, 120, 210), (30, 160, 70), (255, 255, 255), (20, 20, 24), (240, 120, 20),
    (150, 60, 170),
)  # fmt: skip
_REAL_BOARDS: dict[str, Colour] = {
    **dict.fromkeys(_codes("US CA JP CN KR TR TH MX BR CH IT SE SK CZ"), (0, 104, 62)),
    **dict.fromkeys(_codes("DE FR ES RU GB PL NL AT BE TW IN UA"), (0, 82, 165)),
    **dict.fromkeys(_codes("NO NZ ID"), (250, 200, 20)),
}
_PLATES: tuple[tuple[Colour, Colour], ...] = (
    ((245, 245, 245), (20, 20, 30)), ((250, 205, 40), (20, 20, 20)), ((20, 20, 22), (240, 240, 240)),
    ((30, 70, 180), (250, 250, 250)), ((30, 140, 80), (250, 250, 250)), ((200, 30, 40), (255, 255, 255)),
)  # fmt: skip
_POLES: tuple[Colour, ...] = (
    (96, 68, 46), (176, 174, 168), (70, 74, 80), (224, 222, 214), (60, 96, 72), (140, 100, 60)
)  # fmt: skip


@dataclass(frozen=True)
class Country:
    """Roadside style of one country; colours are sRGB triples in [0, 255].

    Attributes:
        code: ISO 3166-1 alpha-2, upper case; "" stands for unknown.
        drives_left: the camera's lane is the left one.
        script: writing on signs; "latin" where no other is known.
        centre_line: paint between the lanes.
        centre_solid: solid rather than dashed.
        edge_line: paint of the road's edges, None for none.
        edge_dashed: dashed rather than solid.
        asphalt: grey level offset of the road surface, -24 to 30.
        board: background of signs.
        accent: stripes of the sign, and the landmark.
        stripes: 0 border, 1 top bar, 2 left bar, 3 two bars, 4 diagonal.
        plate: background and letters of number plates.
        pole: colour of utility poles.
        pole_arms: 0 to 2 cross-arms.
        num_wires: 0 to 4.
        bollard: body and band of the posts beside the road.
        landmark: 0 steeple, 1 dome, 2 pagoda, 3 silo, 4 slab tower, 5 onion tower.
    """

    code: str
    drives_left: bool
    script: str
    centre_line: Colour
    centre_solid: bool
    edge_line: Colour | None
    edge_dashed: bool
    asphalt: float
    board: Colour
    accent: Colour
    stripes: int
    plate: tuple[Colour, Colour]
    pole: Colour
    pole_arms: int
    num_wires: int
    bollard: tuple[Colour, Colour]
    landmark: int


def stable_random(*key: object) -> np.random.Generator:
    """A generator fixed by the text of `key`: the same in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


@lru_cache(maxsize=512)
def country(code: str) -> Country:
    """The style of a country; any text is accepted, unknown codes get the style of their hash."""
    code = code.strip().upper()
    draw = stable_random("country", code).random(16)
    script = next((name for name, codes in _SCRIPTS.items() if code in codes.split()), "latin")
    board = _REAL_BOARDS.get(code, _BOARDS[int(draw[0] * len(_BOARDS))])
    accents = [accent for accent in _ACCENTS if np.abs(np.subtract(accent, board)).sum() > 200]
    bodies = [(240, 240, 236), (250, 200, 30), (220, 60, 40), (40, 44, 52), (240, 130, 30)]
    landmark = {"arabic": 1, "han": 2, "kana": 2, "hangul": 2, "southeast": 2, "cyrillic": 5, "devanagari": 1}
    return Country(
        code=code,
        drives_left=code in LEFT_DRIVING,
        script=script,
        centre_line=YELLOW if code in _YELLOW_CENTRE else WHITE,
        centre_solid=code in _SOLID_CENTRE,
        edge_line=None if code in _NO_EDGE else YELLOW if code in _YELLOW_EDGE else WHITE,
        edge_dashed=code in _DASHED_EDGE,
        asphalt=float(-24 + 54 * draw[1]),
        board=board,
        accent=accents[int(draw[2] * len(accents))],
        stripes=int(draw[3] * 5),
        plate=_PLATES[int(draw[4] ** 1.5 * len(_PLATES))],
        pole=_POLES[int(draw[5] * len(_POLES))],
        pole_arms=int(draw[6] * 3),
        num_wires=int(draw[7] * 5),
        bollard=(bodies[int(draw[8] * 5)], _ACCENTS[int(draw[9] * len(_ACCENTS))]),
        landmark=landmark.get(script, (0, 3, 4, 0)[int(draw[10] * 4)]),
    )
