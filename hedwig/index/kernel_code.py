"""The program of the scan, in the language of LLVM: what `hedwig.index.kernel` compiles and calls.

    one     the scan for a single query, which it checks: what takes NumPy several calls is done in one
    scan    every run of pairs (cell, query) with the same cell, a tile of vectors at a time
    tileN   the products of some vectors with N queries
    offer   a score that may be among the best of its query, put where it belongs
    score   the products of vectors that are known by number
    every   the products of all vectors with every query

Every function below writes the function of its name; ``b.load`` and the like append an instruction, and nothing is
computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.ir as ir

__all__ = ["MOST", "module_of"]

MOST = 256  # cells that `one` is asked for, and neighbours that it is asked for

_LANES = 16  # of one sum: one AVX-512 register, two of AVX, four of NEON
_SUMS = 2  # at once, for the next addition does not wait for the last
_TOGETHER = (4, 3, 2, 1)  # queries for which a component is turned to fp32 once, the largest number first
_TILE = 256  # vectors that stay in the cache until every query has had them: 384 kB of 768 halves
_AHEAD_BYTES = 3072
_LINE_BYTES = 64

_I1, _I8, _I32, _I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_F32, _PTR = ir.FloatType(), ir.PointerType()
_STORED: dict[str, Any] = {"float16": ir.HalfType(), "float32": _F32, "uint8": _I8}
_WIDTH = {"half": 2, "float": 4, "i8": 1}
_SUM = ir.VectorType(_F32, _LANES)


def module_of(stored: str) -> ir.Module:
    """The module with `one`, `scan`, `score` and `every` for vectors of a type: "float16", "float32" or "uint8"."""
    module = ir.Module("scan")
    offer = _offer(module)
    tiles = {num: _tile(module, _STORED[stored], num, offer) for num in _TOGETHER}
    _one(module, _scan(module, tiles))
    _score(module, _STORED[stored])
    _every(module, _STORED[stored])
    return module


def _one(module: ir.Module, scan: ir.Function) -> None:
    """`one(vectors, dim, starts, num_cells, request, num_asked, top_k)`: 0, or 1 for what must not be searched.

    The request is a block of memory: `MOST` cells, `MOST` numbers, `MOST` scores, then the query.
    """
    kind = ir.FunctionType(_I64, [_PTR, _I64, _PTR, _I64, _PTR, _I64, _I64])
    function = ir.Function(module, kind, "one")
    vectors, dim, starts, num_cells, request, num_asked, top_k = function.args
    b = ir.IRBuilder(function.append_basic_block())
    numbers = b.gep(request, [_I64(MOST)], source_etype=_I64)
    scores = b.gep(numbers, [_I64(MOST)], source_etype=_I64)
    x = b.gep(scores, [_I64(MOST)], source_etype=_F32)
    asking, bad = b.alloca(_I64, size=_I64(MOST)), b.alloca(_I1)
    b.store(_I1(0), bad)

    def refuse_if(condition: Any) -> None:
        b.store(b.or_(b.load(bad, typ=_I1), condition), bad)

    with _steps(b, _I64(0), num_asked, 1) as k:
        above_none = b.add(_item(b, request, k, _I64), _I64(1))  # of -1 it is 0, of anything less a huge number
        refuse_if(b.icmp_unsigned(">", above_none, num_cells))
        b.store(_I64(0), b.gep(asking, [k], source_etype=_I64))
    with _steps(b, _I64(0), dim, 1) as j:
        exponent = b.and_(_item(b, x, j, _I32), _I32(0x7F800000))
        refuse_if(b.icmp_unsigned("==", exponent, _I32(0x7F800000)))  # not a number, or infinite
    with _steps(b, _I64(0), top_k, 1) as m:
        b.store(_I64(-1), b.gep(numbers, [m], source_etype=_I64))
        b.store(_F32(float("-inf")), b.gep(scores, [m], source_etype=_F32))
    with b.if_then(b.load(bad, typ=_I1)):
        b.ret(_I64(1))
    b.call(scan, [vectors, dim, starts, request, asking, num_asked, x, top_k, numbers, scores])
    b.ret(_I64(0))


def _scan(module: ir.Module, tiles: dict[int, ir.Function]) -> ir.Function:
    """`scan(vectors, dim, starts, cells, asking, num_pairs, x, top_k, numbers, scores)`: cells stand together.

    `tiles` has the largest number of queries first.
    """
    kind = ir.FunctionType(ir.VoidType(), [_PTR, _I64, _PTR, _PTR, _PTR, _I64, _PTR, _I64, _PTR, _PTR])
    function = ir.Function(module, kind, "scan")
    vectors, dim, starts, cells, asking, num_pairs, x, top_k, numbers, scores = function.args
    b = ir.IRBuilder(function.append_basic_block())
    pair, end, group = (b.alloca(_I64) for _ in range(3))
    b.store(_I64(0), pair)
    with _while(b, lambda: b.icmp_signed("<", b.load(pair, typ=_I64), num_pairs)):
        first = b.load(pair, typ=_I64)
        cell = _item(b, cells, first, _I64)
        b.store(b.add(first, _I64(1)), end)

        def same_cell() -> Any:
            at = b.load(end, typ=_I64)
            inside = b.icmp_signed("<", at, num_pairs)
            other = _item(b, cells, b.select(inside, at, first), _I64)
            return b.and_(inside, b.icmp_signed("==", other, cell))

        with _while(b, same_cell):
            b.store(b.add(b.load(end, typ=_I64), _I64(1)), end)
        stop = b.load(end, typ=_I64)
        b.store(stop, pair)
        with b.if_then(b.icmp_signed(">=", cell, _I64(0))):
            start, behind = _item(b, starts, cell, _I64), _item(b, starts, b.add(cell, _I64(1)), _I64)
            with _steps(b, start, behind, _TILE) as tile:
                tile_end = b.add(tile, _I64(_TILE))
                tile_end = b.select(b.icmp_signed("<", tile_end, behind), tile_end, behind)
                b.store(first, group)
                for num in tiles:

                    def enough(num: int = num) -> Any:
                        return b.icmp_signed("<=", b.add(b.load(group, typ=_I64), _I64(num)), stop)

                    with _while(b, enough):
                        at = b.load(group, typ=_I64)
                        who = b.gep(asking, [at], source_etype=_I64)
                        b.call(tiles[num], [vectors, dim, tile, tile_end, who, x, top_k, numbers, scores])
                        b.store(b.add(at, _I64(num)), group)
    b.ret_void()
    return function


def _tile(module: ir.Module, stored: Any, num: int, offer: ir.Function) -> ir.Function:
    """`tile(vectors, dim, start, stop, asking, x, top_k, numbers, scores)`: some vectors for `num` queries."""
    kind = ir.FunctionType(ir.VoidType(), [_PTR, _I64, _I64, _I64, _PTR, _PTR, _I64, _PTR, _PTR])
    function = ir.Function(module, kind, f"tile{num}")
    vectors, dim, start, stop, asking, x, top_k, numbers, scores = function.args
    b = ir.IRBuilder(function.append_basic_block())
    who = [_item(b, asking, _I64(q), _I64) for q in range(num)]
    queries = [b.gep(x, [b.mul(q, dim)], source_etype=_F32) for q in who]
    places = [b.mul(q, top_k) for q in who]
    theirs = [
        (b.gep(scores, [place], source_etype=_F32), b.gep(numbers, [place], source_etype=_I64)) for place in places
    ]
    with _steps(b, start, stop, 1) as row:
        vector = b.gep(vectors, [b.mul(row, dim)], source_etype=stored)
        ahead = b.gep(vector, [_I64(_AHEAD_BYTES)], source_etype=_I8)
        products = _products(b, stored, vector, ahead, queries, dim)
        for score, (their_scores, their_numbers) in zip(products, theirs, strict=True):
            worst = _item(b, their_scores, b.sub(top_k, _I64(1)), _F32)
            with b.if_then(b.fcmp_ordered(">=", score, worst), likely=False):
                b.call(offer, [their_scores, their_numbers, top_k, score, row])
    b.ret_void()
    return function


def _score(module: ir.Module, stored: Any) -> None:
    """`score(vectors, dim, numbers, num_queries, per_query, x, scores)`: of vectors that are named; -inf for -1."""
    kind = ir.FunctionType(ir.VoidType(), [_PTR, _I64, _PTR, _I64, _I64, _PTR, _PTR])
    function = ir.Function(module, kind, "score")
    vectors, dim, numbers, num_queries, per_query, x, scores = function.args
    b = ir.IRBuilder(function.append_basic_block())
    last = b.sub(b.mul(num_queries, per_query), _I64(1))
    with _steps(b, _I64(0), num_queries, 1) as q, _steps(b, _I64(0), per_query, 1) as c:
        at = b.add(b.mul(q, per_query), c)
        following = b.add(at, _I64(1))
        following = b.select(b.icmp_signed("<", following, last), following, last)
        number, then = _item(b, numbers, at, _I64), _item(b, numbers, following, _I64)
        place = b.gep(scores, [at], source_etype=_F32)
        b.store(_F32(float("-inf")), place)
        with b.if_then(b.icmp_signed(">=", number, _I64(0))):
            vector, ahead = (b.gep(vectors, [b.mul(n, dim)], source_etype=stored) for n in (number, then))
            query = b.gep(x, [b.mul(q, dim)], source_etype=_F32)
            b.store(_products(b, stored, vector, ahead, [query], dim)[0], place)
    b.ret_void()


def _every(module: ir.Module, stored: Any) -> None:
    """`every(vectors, dim, num, num_queries, x, scores)`: the scores of the first query, then those of the next."""
    kind = ir.FunctionType(ir.VoidType(), [_PTR, _I64, _I64, _I64, _PTR, _PTR])
    function = ir.Function(module, kind, "every")
    vectors, dim, num, num_queries, x, scores = function.args
    b = ir.IRBuilder(function.append_basic_block())
    first = b.alloca(_I64)
    b.store(_I64(0), first)
    for together in _TOGETHER:

        def enough(together: int = together) -> Any:
            return b.icmp_signed("<=", b.add(b.load(first, typ=_I64), _I64(together)), num_queries)

        with _while(b, enough):
            some = [b.add(b.load(first, typ=_I64), _I64(q)) for q in range(together)]
            queries = [b.gep(x, [b.mul(q, dim)], source_etype=_F32) for q in some]
            theirs = [b.gep(scores, [b.mul(q, num)], source_etype=_F32) for q in some]
            with _steps(b, _I64(0), num, 1) as row:
                vector = b.gep(vectors, [b.mul(row, dim)], source_etype=stored)
                ahead = b.gep(vector, [_I64(_AHEAD_BYTES)], source_etype=_I8)
                for score, place in zip(_products(b, stored, vector, ahead, queries, dim), theirs, strict=True):
                    b.store(score, b.gep(place, [row], source_etype=_F32))
            b.store(b.add(some[0], _I64(together)), first)
    b.ret_void()


def _products(b: ir.IRBuilder, stored: Any, vector: Any, ahead: Any, queries: list[Any], dim: Any) -> list[Any]:
    """The products of a vector with each query, while what lies at `ahead` is asked for."""
    module = b.module
    prefetch = _declared(module, "llvm.prefetch.p0", ir.VoidType(), [_PTR, _I32, _I32, _I32])
    fma = _declared(module, f"llvm.fma.v{_LANES}f32", _SUM, [_SUM] * 3)
    fma_one = _declared(module, "llvm.fma.f32", _F32, [_F32] * 3)
    with b.goto_entry_block():
        sums = [[b.alloca(_SUM) for _ in range(_SUMS)] for _ in queries]
        tails = [b.alloca(_F32) for _ in queries]
    for each, tail in zip(sums, tails, strict=True):
        b.store(_F32(0.0), tail)
        for one in each:
            b.store(ir.Constant(_SUM, None), one)
    width, step = _WIDTH[str(stored)], _LANES * _SUMS
    whole = b.and_(dim, _I64(-step))
    with _steps(b, _I64(0), whole, step) as j:
        line = b.gep(ahead, [b.mul(j, _I64(width))], source_etype=_I8)
        for more in range(0, step * width, _LINE_BYTES):
            there = b.gep(line, [_I64(more)], source_etype=_I8)
            b.call(prefetch, [there, _I32(0), _I32(3), _I32(1)])  # to read, to keep, data
        for s in range(_SUMS):
            at = b.add(j, _I64(s * _LANES))
            some = b.gep(vector, [at], source_etype=stored)
            values = _floats(b, b.load(some, typ=ir.VectorType(stored, _LANES), align=width), _SUM)
            for query, each in zip(queries, sums, strict=True):
                theirs = b.load(b.gep(query, [at], source_etype=_F32), typ=_SUM, align=4)
                b.store(b.call(fma, [values, theirs, b.load(each[s], typ=_SUM)]), each[s])
    with _steps(b, whole, dim, 1) as j:
        value = _floats(b, _item(b, vector, j, stored), _F32)
        for query, tail in zip(queries, tails, strict=True):
            b.store(b.call(fma_one, [value, _item(b, query, j, _F32), b.load(tail, typ=_F32)]), tail)
    return [
        b.fadd(_sum(b, [b.load(one, typ=_SUM) for one in each]), b.load(tail, typ=_F32))
        for each, tail in zip(sums, tails, strict=True)
    ]


def _offer(module: ir.Module) -> ir.Function:
    """`offer(scores, numbers, top_k, score, number)`: put it into a list that is in order, or nowhere."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_PTR, _PTR, _I64, _F32, _I64]), "offer")
    scores, numbers, top_k, score, number = function.args
    b = ir.IRBuilder(function.append_basic_block())
    place = b.alloca(_I64)

    def better_than(at: Any) -> Any:
        other = _item(b, scores, at, _F32)
        earlier = b.icmp_signed("<", number, _item(b, numbers, at, _I64))
        return b.or_(b.fcmp_ordered(">", score, other), b.and_(b.fcmp_ordered("==", score, other), earlier))

    last = b.sub(top_k, _I64(1))
    with b.if_then(b.not_(better_than(last))):
        b.ret_void()
    b.store(last, place)

    def moves_up() -> Any:
        at = b.load(place, typ=_I64)
        inside = b.icmp_signed(">", at, _I64(0))
        return b.and_(inside, better_than(b.select(inside, b.sub(at, _I64(1)), _I64(0))))

    with _while(b, moves_up):
        at = b.load(place, typ=_I64)
        before = b.sub(at, _I64(1))
        b.store(_item(b, scores, before, _F32), b.gep(scores, [at], source_etype=_F32))
        b.store(_item(b, numbers, before, _I64), b.gep(numbers, [at], source_etype=_I64))
        b.store(before, place)
    at = b.load(place, typ=_I64)
    b.store(score, b.gep(scores, [at], source_etype=_F32))
    b.store(number, b.gep(numbers, [at], source_etype=_I64))
    b.ret_void()
    return function


def _sum(b: ir.IRBuilder, sums: list[Any]) -> Any:
    """The sum of all lanes, halves onto halves: an order that no processor changes."""
    total = sums[0]
    for other in sums[1:]:
        total = b.fadd(total, other)
    lanes = _LANES
    while lanes > 1:
        lanes //= 2
        low, high = (
            b.shuffle_vector(total, total, ir.Constant(ir.VectorType(_I32, lanes), [*range(first, first + lanes)]))
            for first in (0, lanes)
        )
        total = b.fadd(low, high)
    return b.extract_element(total, _I32(0))


def _floats(b: ir.IRBuilder, values: Any, kind: Any) -> Any:
    stored = str(getattr(values.type, "element", values.type))
    if stored == "float":
        return values
    return b.fpext(values, kind) if stored == "half" else b.uitofp(values, kind)


def _item(b: ir.IRBuilder, array: Any, at: Any, kind: Any) -> Any:
    return b.load(b.gep(array, [at], source_etype=kind), typ=kind)


def _declared(module: ir.Module, name: str, returned: Any, taken: list[Any]) -> ir.Function:
    found = module.globals.get(name)
    return found if found is not None else ir.Function(module, ir.FunctionType(returned, taken), name)


@contextmanager
def _while(b: ir.IRBuilder, condition: Callable[[], Any]) -> Iterator[None]:
    """The body runs as long as the condition, which is asked before every turn, holds."""
    head, body, end = (b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    b.cbranch(condition(), body, end)
    b.position_at_end(body)
    yield
    b.branch(head)
    b.position_at_end(end)


@contextmanager
def _steps(b: ir.IRBuilder, start: Any, stop: Any, step: int) -> Iterator[Any]:
    """The body runs for every number from start on below stop."""
    with b.goto_entry_block():
        number = b.alloca(_I64)
    b.store(start, number)
    with _while(b, lambda: b.icmp_signed("<", b.load(number, typ=_I64), stop)):
        at = b.load(number, typ=_I64)
        yield at
        b.store(b.add(at, _I64(step)), number)
