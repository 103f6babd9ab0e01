"""Ask a running server, with the official client: python examples/openai_client.py [base URL]

Start one first, for example with `make serve`. Needs the `openai` package.
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main() -> None:
    client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1", api_key="none")
    model = client.models.list().data[0].id

    completion = client.completions.create(model=model, prompt="Once upon a time", max_tokens=32, seed=1)
    print(f"completion: {completion.choices[0].text!r}")

    print("chat: ", end="")
    messages = [{"role": "user", "content": "Hello!"}]
    for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=32, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
