"""The engine without HTTP in front of it."""

import queue

import pytest

from rlver_jax.serving import programs
from rlver_jax.serving.engine import CHUNKS, Engine, EngineDown, EngineFull, GenerationParams
from rlver_jax.text.chat import ChatTemplate
from tests.serving.conftest import BLOCK, CONTEXT, ROWS


def generate(engine: Engine, *wanted: GenerationParams):
    """Chunks of each reply, until all have ended."""
    chunks: queue.Queue = queue.Queue()
    engine.submit([(params, lambda chunk, i=i: chunks.put((i, chunk))) for i, params in enumerate(wanted)])
    replies = [[] for _ in wanted]
    while not all(reply and reply[-1].finish for reply in replies):
        index, chunk = chunks.get(timeout=60)
        replies[index].append(chunk)
    return replies


def test_nothing_is_compiled_once_it_serves(engine, bpe):
    """With weights bound to a device: prompts of every chunk size, scored ones, warm and greedy replies."""
    for program in (programs.prefill, programs.prefill_and_score, programs.decode_block):
        program.clear_cache()
    fresh = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=BLOCK)
    fresh.warm_up()
    before = programs.compiled()
    assert before == len(CHUNKS) + 2, "one for each chunk, one that scores, one that decodes"
    fresh.start()
    words = bpe.encode("my boss did not listen and she felt awful. " * 30)
    wanted = [
        GenerationParams(words[:n], 5, temperature=t) for n in (1, CHUNKS[0], 200, CONTEXT - 5) for t in (0.0, 1.0)
    ]
    generate(
        fresh,
        *wanted,
        GenerationParams(words[:40], 5, score_prompt=True, details=True),
        GenerationParams(words[:3], 0, score_prompt=True),
    )
    fresh.close()
    assert programs.compiled() == before


def test_a_row_starts_anew(engine, bpe):
    """What a row held before, and what its neighbours hold, changes nothing of a reply."""
    engine = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=BLOCK)
    engine.warm_up()
    engine.start()
    chat = ChatTemplate(bpe)
    prompt = chat.message("system", "Say.") + chat.message("user", "I felt awful") + chat.open("assistant")
    params = GenerationParams(prompt, 12, temperature=1.4, seed=5)
    text = lambda chunks: "".join(chunk.text for chunk in chunks)  # noqa: E731
    first = text(generate(engine, params)[0])
    others = [GenerationParams(bpe.encode("my boss " * (9 * n + 1)), 30, temperature=1, seed=n) for n in range(9)]
    assert text(generate(engine, *others, params)[-1]) == first
    assert text(generate(engine, params)[0]) == first
    assert len(first) > 5
    engine.close()


def test_replies_wanted_together_share_their_steps(engine, bpe):
    """More than there are rows: the same texts as one by one, in fewer than half as many steps."""
    engine = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=BLOCK)
    engine.warm_up()
    engine.start()
    wanted = [GenerationParams(bpe.encode("my boss " * (n + 1)), 30, temperature=1.3, seed=n) for n in range(4 * ROWS)]
    text = lambda chunks: "".join(chunk.text for chunk in chunks)  # noqa: E731
    alone = [text(generate(engine, params)[0]) for params in wanted]
    middle = engine.stats()
    assert [text(chunks) for chunks in generate(engine, *wanted)] == alone
    after = engine.stats()
    engine.close()
    assert middle["steps"] == middle["tokens"]["generated"] == after["tokens"]["generated"] / 2
    assert after["steps"] - middle["steps"] < middle["steps"] / 2


def test_what_cannot_be_taken_is_refused_as_a_whole(engine, bpe):
    engine = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=BLOCK, queue=2)
    wanted = [(GenerationParams([1], 1), lambda chunk: None)]
    with pytest.raises(EngineFull, match="at most 2"):
        engine.submit(wanted * 3)
    assert engine.stats()["waiting"] == 0
    ended = []
    requests = engine.submit([(GenerationParams([1], 1), ended.append)] * 2)
    engine.close()
    engine._run()  # what a thread does that finds the engine closed
    assert [chunk.finish for chunk in ended] == ["error"] * len(requests)
    with pytest.raises(EngineDown):
        engine.submit(wanted)
