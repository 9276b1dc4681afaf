#!/usr/bin/env python3
"""Called by `fovea prepare --tokenizer`: tokenize_captions.py tokenizer.json <texts >ids

Reads one JSON string per line, writes {"vocabulary": N} and then one list of ids per line. A failure
is one line on the standard error output.
"""
import json
import sys

try:
    from tokenizers import Tokenizer
except ImportError as error:
    sys.exit(f"--tokenizer needs the Python package tokenizers ({error}): "
             f"{sys.executable} -m pip install tokenizers, or set PYTHON")


def main():
    path = sys.argv[1]
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the package raises nothing narrower
        sys.exit(f"{path}: no tokenizer.json: {' '.join(str(error).split())}")
    tokenizer.no_truncation()  # a caption that is too long is an error, not a shorter caption
    tokenizer.no_padding()
    texts = [json.loads(line) for line in sys.stdin.buffer]
    # Ids may have gaps, so their number does not bound them.
    vocabulary = max(tokenizer.get_vocab().values(), default=-1) + 1
    print(json.dumps({"vocabulary": vocabulary}))
    for encoding in tokenizer.encode_batch(texts):
        print(json.dumps(encoding.ids))


main()
