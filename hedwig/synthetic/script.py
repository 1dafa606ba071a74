"""Sign boards: background, stripes and two lines of strokes in the manner of a writing system.

The strokes are no letters of any alphabet, but they keep what survives at a few pixels: Han is dense and square, Hangul
has circles, Arabic runs along a baseline, Devanagari hangs from a bar, Thai has loops, Latin and Cyrillic are bare
stems. No fonts. Every country adds its colours and stripe pattern.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hedwig.synthetic.countries import Country

__all__ = ["BOARD_SHAPE", "sign_board"]

BOARD_SHAPE = (64, 96)
_CELL = 12


def _glyph(script: str, random: np.random.Generator) -> NDArray[np.bool_]:
    """One glyph, (12, 12) boolean, drawn from strokes typical of the script."""
    cell = np.zeros((_CELL, _CELL), bool)
    y, x = np.mgrid[:_CELL, :_CELL]
    picks = random.random(8)

    def ring(row: float, column: float, radius: float) -> None:
        cell[np.abs(np.hypot(y - row, x - column) - radius) < 0.8] = True

    if script in ("han", "kana", "hangul"):
        if script == "han":
            cell[[1, 4 + int(2 * picks[0]), 9], 1:11] = True
            cell[1:11, [2, 5 + int(2 * picks[1]), 9]] = True
            cell[np.abs(x - y) < (0.8 if picks[2] > 0.5 else 0)] = True
        elif script == "kana":
            cell[2 + int(3 * picks[0]), 2:10] = True
            cell[np.abs(x + y - 11 - 3 * picks[1]) < 0.9] = True
            ring(7, 6 + 2 * picks[2], 2.5)
        else:
            ring(3, 3.5, 2.4)
            cell[1:7, 8:10] = True
            cell[3 + int(2 * picks[0]), 6:11] = True
            cell[8:11, 2:10:7] = True
            cell[10, 2:10] = True
    elif script == "arabic":
        cell[8:10, :] = True
        cell[3 if picks[0] > 0.6 else 6 : 9, 2 + int(7 * picks[1])] = True
        ring(7, 3 + 6 * picks[2], 2.2)
        cell[1 if picks[3] > 0.5 else 11, int(10 * picks[4]) : int(10 * picks[4]) + 2] = True
    elif script in ("devanagari", "tibetan"):
        cell[1:3, :] = True
        cell[1:11, 8:10] = picks[0] > 0.3
        ring(6, 4, 2.0 + picks[1])
        cell[8 + int(3 * picks[2]), 2:8] = True
    elif script == "southeast":
        ring(3, 3, 1.8)
        cell[3:11, 5 if picks[0] > 0.5 else 2] = True
        cell[3:11, 9] = True
        cell[3 if picks[1] > 0.5 else 10, 4:10] = True
        ring(1, 9, 1.2)
    elif script == "ethiopic":
        cell[1:11, [2, 9]] = True
        cell[[2, 6] if picks[0] > 0.5 else [5, 6], 2:10] = True
        ring(10, 9 if picks[1] > 0.5 else 2, 1.2)
    elif script == "hebrew":
        cell[2:4, 1:10] = True
        cell[2:11, 8:10] = True
        cell[10 if picks[0] > 0.4 else 2, 2:9] = True
    else:
        thick = 1 if script == "latin" else 2
        cell[1:11, 2 : 2 + thick] = picks[0] > 0.15
        cell[1:11, 8 : 8 + thick] = picks[1] > 0.45
        cell[[1, 10][int(2 * picks[2])], 2:9] = picks[3] > 0.3
        cell[5:7, 2:9] = picks[4] > 0.5
        if script in ("greek", "caucasian") or picks[5] > 0.75:
            ring(6, 5.5, 3.2)
    return cell


def sign_board(country: Country, random: np.random.Generator) -> NDArray[np.float32]:
    """A board of the country, (3, 64, 96) in [0, 255]; `random` chooses the words."""
    height, width = BOARD_SHAPE
    board = np.empty((3, height, width), np.float32)
    board[:] = np.array(country.board, np.float32)[:, None, None]
    stripe = np.zeros((height, width), bool)
    y, x = np.mgrid[:height, :width]
    if country.stripes == 0:
        stripe[:6], stripe[-6:], stripe[:, :6], stripe[:, -6:] = True, True, True, True
    elif country.stripes == 1:
        stripe[:18] = True
    elif country.stripes == 2:
        stripe[:, :24] = True
    elif country.stripes == 3:
        stripe[:10], stripe[-10:] = True, True
    else:
        stripe[(x + y) % 160 < 34] = True
    board[:, stripe] = np.array(country.accent, np.float32)[:, None]
    dark = np.dot(country.board, (0.3, 0.59, 0.11)) < 140
    ink = np.zeros((height, width), bool)
    for line in (7, 35):
        for column in range(10, width - 2 * _CELL, 2 * _CELL + 2):
            if random.random() < 0.9:
                glyph = _glyph(country.script, random).repeat(2, axis=0).repeat(2, axis=1)
                ink[line : line + 2 * _CELL, column : column + 2 * _CELL] = glyph
    board[:, ink] = 250 if dark else 16
    return board
