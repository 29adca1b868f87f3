"""The engine without HTTP in front of it."""

import queue

import pytest

from rlver_jax.serving import programs
from rlver_jax.serving.engine import CHUNKS, Engine, EngineDown, EngineFull, Work
from rlver_jax.text.chat import ChatTemplate
from tests.serving.conftest import BLOCK, CONTEXT, ROWS


def asked(engine: Engine, *works: Work):
    """Pieces of each reply, until all have ended."""
    pieces: queue.Queue = queue.Queue()
    engine.submit([(work, lambda piece, i=i: pieces.put((i, piece))) for i, work in enumerate(works)])
    said = [[] for _ in works]
    while not all(some and some[-1].finish for some in said):
        index, piece = pieces.get(timeout=60)
        said[index].append(piece)
    return said


def test_nothing_is_compiled_once_it_serves(engine, bpe):
    """With weights bound to a device: prompts of every chunk size, scored ones, warm and greedy replies."""
    for program in (programs.prefill, programs.read_and_score, programs.speak):
        program.clear_cache()
    fresh = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=BLOCK)
    fresh.warm_up()
    before = programs.compiled()
    assert before == len(CHUNKS) + 2, "one for each chunk, one that scores, one that speaks"
    fresh.start()
    words = bpe.encode("my boss did not listen and she felt awful. " * 30)
    works = [Work(words[:n], 5, temperature=t) for n in (1, CHUNKS[0], 200, CONTEXT - 5) for t in (0.0, 1.0)]
    asked(fresh, *works, Work(words[:40], 5, score_prompt=True, details=True), Work(words[:3], 0, score_prompt=True))
    fresh.close()
    assert programs.compiled() == before


def test_a_row_starts_anew(engine, bpe):
    """What a row held before, and what its neighbours hold, changes nothing of a reply."""
    engine = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=BLOCK)
    engine.warm_up()
    engine.start()
    chat = ChatTemplate(bpe)
    prompt = chat.message("system", "Say.") + chat.message("user", "I felt awful") + chat.open("assistant")
    work = Work(prompt, 12, temperature=1.4, seed=5)
    text = lambda pieces: "".join(piece.text for piece in pieces)  # noqa: E731
    first = text(asked(engine, work)[0])
    others = [Work(bpe.encode("my boss " * (9 * n + 1)), 30, temperature=1, seed=n) for n in range(9)]
    assert text(asked(engine, *others, work)[-1]) == first
    assert text(asked(engine, work)[0]) == first
    assert len(first) > 5
    engine.close()


def test_replies_wanted_together_share_their_steps(engine, bpe):
    """More than there are rows: the same texts as one by one, in fewer than half as many steps."""
    engine = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=BLOCK)
    engine.warm_up()
    engine.start()
    works = [Work(bpe.encode("my boss " * (n + 1)), 30, temperature=1.3, seed=n) for n in range(4 * ROWS)]
    text = lambda pieces: "".join(piece.text for piece in pieces)  # noqa: E731
    alone = [text(asked(engine, work)[0]) for work in works]
    middle = engine.stats()
    assert [text(pieces) for pieces in asked(engine, *works)] == alone
    after = engine.stats()
    engine.close()
    assert middle["steps"] == middle["tokens"]["generated"] == after["tokens"]["generated"] / 2
    assert after["steps"] - middle["steps"] < middle["steps"] / 2


def test_what_cannot_be_taken_is_refused_as_a_whole(engine, bpe):
    engine = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=BLOCK, queue=2)
    wanted = [(Work([1], 1), lambda piece: None)]
    with pytest.raises(EngineFull, match="at most 2"):
        engine.submit(wanted * 3)
    assert engine.stats()["waiting"] == 0
    ended = []
    tickets = engine.submit([(Work([1], 1), ended.append)] * 2)
    engine.close()
    engine._run()  # what a thread does that finds the engine closed
    assert [piece.finish for piece in ended] == ["error"] * len(tickets)
    with pytest.raises(EngineDown):
        engine.submit(wanted)
