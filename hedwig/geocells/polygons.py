"""Administrative polygons by path: what they name, which covers a point, else which is nearest and how far it is.

Files may be GeoParquet, GeoJSON, GeoPackage or (zipped) Shapefile, local or on ``s3://`` and ``gs://``. The columns of
the three usual sources are known, so a path is enough:

- geoBoundaries CGAZ (``geoBoundariesCGAZ_ADM0``, ``_ADM1``, ``_ADM2``; CC BY 4.0, gaps filled, admin-2 worldwide):
  ``shapeGroup`` holds ISO alpha-3 codes, ``shapeName`` the names. Credit geoBoundaries (Runfola et al., 2020). Disputed
  areas have numbers in place of codes; their points go to the nearest country, and the distance says so.
- Natural Earth (``ne_10m_admin_0_countries``, ``ne_10m_admin_1_states_provinces``; public domain): ``ISO_A2_EH``,
  because ``ISO_A2`` is -99 for France and Norway, and ``name``. It has no admin-2.
- GADM 4.1 (``GID_0``, ``NAME_1``, ``NAME_2``), which PIGEON used: its licence allows academic and other non-commercial
  use only and forbids redistribution, and cells made from it inherit that question. It is read but never the default.

Polygons must be cut at the antimeridian, as these three are. Shapely's order (x = lon, y = lat) stays inside.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hedwig import storage
from hedwig.geo import chord_to_km, unit_vectors

__all__ = ["COUNTRY_COLUMNS", "NAME_COLUMNS", "PolygonLayer", "PolygonSource", "alpha2", "read_polygons"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Strings = NDArray[np.object_]
PolygonSource: TypeAlias = "str | Path | gpd.GeoDataFrame"

BORDER_STEP_DEG = 0.05  # spacing of border points: the distance to a polygon is right to within 3 km
COUNTRY_COLUMNS = ("ISO_A2_EH", "iso_a2_eh", "iso_a2", "ISO_A2", "shapeGroup", "GID_0", "iso_a3", "ISO_A3")
NAME_COLUMNS = {
    1: ("name", "NAME", "shapeName", "NAME_1"),
    2: ("name", "NAME", "shapeName", "NAME_2", "nom", "prov_name"),
}
_ALPHA3 = """
ABWAW AFGAF AGOAO AIAAI ALAAX ALBAL ANDAD AREAE ARGAR ARMAM ASMAS ATAAQ ATFTF ATGAG AUSAU AUTAT AZEAZ BDIBI BELBE BENBJ
BESBQ BFABF BGDBD BGRBG BHRBH BHSBS BIHBA BLMBL BLRBY BLZBZ BMUBM BOLBO BRABR BRBBB BRNBN BTNBT BVTBV BWABW CAFCF CANCA
CCKCC CHECH CHLCL CHNCN CIVCI CMRCM CODCD COGCG COKCK COLCO COMKM CPVCV CRICR CUBCU CUWCW CXRCX CYMKY CYPCY CZECZ DEUDE
DJIDJ DMADM DNKDK DOMDO DZADZ ECUEC EGYEG ERIER ESHEH ESPES ESTEE ETHET FINFI FJIFJ FLKFK FRAFR FROFO FSMFM GABGA GBRGB
GEOGE GGYGG GHAGH GIBGI GINGN GLPGP GMBGM GNBGW GNQGQ GRCGR GRDGD GRLGL GTMGT GUFGF GUMGU GUYGY HKGHK HMDHM HNDHN HRVHR
HTIHT HUNHU IDNID IMNIM INDIN IOTIO IRLIE IRNIR IRQIQ ISLIS ISRIL ITAIT JAMJM JEYJE JORJO JPNJP KAZKZ KENKE KGZKG KHMKH
KIRKI KNAKN KORKR KWTKW LAOLA LBNLB LBRLR LBYLY LCALC LIELI LKALK LSOLS LTULT LUXLU LVALV MACMO MAFMF MARMA MCOMC MDAMD
MDGMG MDVMV MEXMX MHLMH MKDMK MLIML MLTMT MMRMM MNEME MNGMN MNPMP MOZMZ MRTMR MSRMS MTQMQ MUSMU MWIMW MYSMY MYTYT NAMNA
NCLNC NERNE NFKNF NGANG NICNI NIUNU NLDNL NORNO NPLNP NRUNR NZLNZ OMNOM PAKPK PANPA PCNPN PERPE PHLPH PLWPW PNGPG POLPL
PRIPR PRKKP PRTPT PRYPY PSEPS PYFPF QATQA REURE ROURO RUSRU RWARW SAUSA SDNSD SENSN SGPSG SGSGS SHNSH SJMSJ SLBSB SLESL
SLVSV SMRSM SOMSO SPMPM SRBRS SSDSS STPST SURSR SVKSK SVNSI SWESE SWZSZ SXMSX SYCSC SYRSY TCATC TCDTD TGOTG THATH TJKTJ
TKLTK TKMTM TLSTL TONTO TTOTT TUNTN TURTR TUVTV TWNTW TZATZ UGAUG UKRUA UMIUM URYUY USAUS UZBUZ VATVA VCTVC VENVE VGBVG
VIRVI VNMVN VUTVU WLFWF WSMWS XKXXK YEMYE ZAFZA ZMBZM ZWEZW
"""
_TO_ALPHA2 = {code[:3]: code[3:] for code in _ALPHA3.split()}  # ISO 3166-1, and XKX of GADM and the World Bank


def alpha2(code: object) -> str:
    """ISO 3166-1 alpha-2 of an alpha-2 or alpha-3 code; "" of anything else (-99, a number, a name, nothing)."""
    text = code.strip() if isinstance(code, str) else ""
    return text if re.fullmatch("[A-Z]{2}", text) else _TO_ALPHA2.get(text, "")


class PolygonLayer:
    """Named polygons that answer: which covers each point, else which is nearest, and how far in km.

    Attributes:
        names: (L,) object array of str.
        geometry: (L,) polygons, lon/lat.
    """

    def __init__(self, names: Strings, geometry: NDArray[np.object_]) -> None:
        self.names = names
        self.geometry = np.where(shapely.is_valid(geometry), geometry, shapely.make_valid(geometry))

    @cached_property
    def _border(self) -> tuple[cKDTree, Ints]:
        """KD-tree of points along all borders, and the polygon each belongs to; built when a point is off all."""
        dense = shapely.segmentize(self.geometry, BORDER_STEP_DEG)
        points, rows = shapely.get_coordinates(dense, return_index=True)
        return cKDTree(unit_vectors(points[:, 1], points[:, 0])), np.asarray(rows, dtype=np.int64)

    def locate(self, lat: Floats, lon: Floats, reach_km: float = np.inf) -> tuple[Ints, Floats]:
        """Row (N,) of the polygon of each point, -1 when none is within reach, and the distance to it in km (N,)."""
        points = shapely.points(lon, lat)
        rows = np.full(len(points), len(self.names), dtype=np.int64)
        polygon, point = shapely.STRtree(points).query(self.geometry, predicate="covers")
        np.minimum.at(rows, point, polygon)  # where two polygons overlap the first of the file wins
        km = np.zeros(len(points))
        off = np.flatnonzero(rows == len(self.names))
        if len(off):
            tree, owner = self._border
            chord, nearest = tree.query(unit_vectors(lat[off], lon[off]))
            km[off] = chord_to_km(chord)
            rows[off] = np.where(km[off] <= reach_km, owner[nearest], -1)
        return rows, km


def read_polygons(
    source: PolygonSource | Sequence[PolygonSource], columns: str | Sequence[str]
) -> tuple[Strings, NDArray[np.object_]]:
    """Names (L,) and polygons (L,) in degrees of one source or several, in their order.

    Args:
        source: path, address or GeoDataFrame, or a sequence of these.
        columns: the column with the names, or candidates of which the first that is there is taken.

    Raises:
        FileNotFoundError: nothing is at the path.
        ValueError: none of the columns is there, the file cannot be read, or it holds no polygons.
    """
    if isinstance(source, (list, tuple)):
        read = [read_polygons(one, columns) for one in source]
        return np.concatenate([names for names, _ in read]), np.concatenate([shapes for _, shapes in read])
    frame: Any = source if isinstance(source, gpd.GeoDataFrame) else _read_file(str(source))
    where = "The polygons" if isinstance(source, gpd.GeoDataFrame) else f"The polygons {source}"
    wanted = (columns,) if isinstance(columns, str) else tuple(columns)
    offered = [str(name) for name in frame.columns if name != frame.geometry.name]
    column = next((name for name in wanted if name in offered), None)
    if column is None:
        missing = repr(wanted[0]) if len(wanted) == 1 else f"named one of {list(wanted)}"
        raise ValueError(f"{where} have no column {missing}; they have {offered}. Name the right one.")
    if frame.crs is not None and not frame.crs.equals("EPSG:4326"):
        frame = frame.to_crs("EPSG:4326")
    frame = frame[frame.geometry.notna() & ~frame.geometry.is_empty & frame.geom_type.isin(["Polygon", "MultiPolygon"])]
    if len(frame) == 0:
        raise ValueError(f"The source with column {column!r} holds no polygons; give it areas, not points or lines.")
    names = np.array(
        [str(name) if isinstance(name, str) or pd.notna(name) else "" for name in frame[column]], dtype=object
    )
    return names, frame.geometry.to_numpy()


def _read_file(path: str) -> gpd.GeoDataFrame:
    path = storage.resolve(path)
    if not storage.exists(path):
        raise FileNotFoundError(f"No polygons at {path!r}; give a GeoJSON, GeoPackage, GeoParquet or Shapefile.")
    with _local_file(path) as local:
        try:
            if local.name.lower().endswith((".parquet", ".geoparquet")):
                return gpd.read_parquet(local)
            return gpd.read_file(local)
        except Exception as error:  # pyogrio, pyarrow and geopandas each have errors of their own
            raise ValueError(f"The polygons {path} cannot be read: {error}") from error


@contextmanager
def _local_file(path: str) -> Iterator[Path]:
    """The file as a local one; of a remote Shapefile with the files beside it that share its name."""
    if not storage.is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="hedwig-") as scratch:
        folder, name = path.rsplit("/", 1)
        parts = [path]
        if name.lower().endswith(".shp"):
            parts = [file for file in storage.list_files(folder) if Path(file).stem == Path(name).stem]
        for part in parts:
            (Path(scratch) / part.rsplit("/", 1)[1]).write_bytes(storage.read_bytes(part))
        yield Path(scratch) / name
