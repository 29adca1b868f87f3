#!/usr/bin/env bash
# tokenizers 0.23.3: Tokenizer.encode keeps all other Python threads waiting until a text is tokenized; encode_batch of one text doesn't.
#
# Both do the same work in Rust and give the same ids, but only the batch variants release the interpreter's lock meanwhile. A thread
# pool around encode (asyncio.to_thread) therefore frees no event loop: nothing else runs for as long as a long text takes. The batch
# of one text lets the others run. The documentation names no such difference.
#
# Hurt: servers that tokenize prompts in threads beside an event loop or a decode loop, with Qwen's tokenizers as with any other.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'tokenizers==0.23.3'
cd "$work" && venv/bin/python - <<'PY'
import random
import threading
import time

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

draw = random.Random(0)
words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(20_000)]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
text = " ".join(draw.choices(words, k=300_000))


def longest_wait(work):
    """(seconds of the work, longest time for which a thread that only looks at the clock did not run, result)."""
    gaps, done = [0.0], threading.Event()

    def tick():
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps[0], last = max(gaps[0], now - last), now

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.perf_counter()
    result = work()
    took = time.perf_counter() - began
    done.set()
    thread.join()
    return took, gaps[0], result


longest_wait(lambda: tokenizer.encode("warm up"))
one = longest_wait(lambda: tokenizer.encode(text))
batch = longest_wait(lambda: tokenizer.encode_batch([text])[0])
for name, (took, gap, _) in (("encode", one), ("encode_batch of one text", batch)):
    print(f"{name}: {len(text) / 1e6:.1f} MB in {took:.2f} s; another thread waited for up to {gap:.2f} s")
assert one[2].ids == batch[2].ids
raise SystemExit(not (one[1] > 0.8 * one[0] and batch[1] < 0.5 * batch[0]))
PY
