"""Runs llama.cpp on a GGUF file, for the tests, in an interpreter that has llama-cpp-python.

    python llama_cpp_client.py model.gguf adapter.gguf|- count text

prints JSON: the tokens of the text, the logits behind it, and the tokens of its most likely
continuation.
"""

import json
import sys

import llama_cpp


def main() -> None:
    model, adapter, count, text = sys.argv[1:]
    llm = llama_cpp.Llama(
        model,
        lora_path=None if adapter == "-" else adapter,
        n_ctx=256,
        n_threads=2,
        logits_all=True,
        verbose=False,
    )
    tokens = llm.tokenize(text.encode(), add_bos=False, special=True)
    llm.eval(tokens)
    logits = llm.scores[len(tokens) - 1].copy()
    continuation = [int(logits.argmax())]
    while len(continuation) < int(count):
        llm.eval(continuation[-1:])
        continuation.append(int(llm.scores[llm.n_tokens - 1].argmax()))
    print(
        json.dumps({"tokens": tokens, "logits": logits.tolist(), "continuation": continuation})
    )


if __name__ == "__main__":
    main()
