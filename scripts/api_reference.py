"""docs/api.md from the HTTP face's own OpenAPI document.

.venv/bin/python scripts/api_reference.py          writes the page
.venv/bin/python scripts/api_reference.py --check  says whether it is what would be written (exit code 1: no)
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/api.md"
METHODS = ("get", "put", "patch", "post", "delete")

HEAD = """# HTTP API

Made by `scripts/api_reference.py` from the gateway's own description, which it serves at `GET /openapi.json`.

The daemon answers on the Unix socket `$NATGW_RUN_DIR/api.sock`, which is root's, and on TCP only where `NATGW_LISTEN`
asks for it ([manual.md](manual.md), "Environment"). `natgw api METHOD PATH` is the same for callers that can only exec:

```sh
curl --unix-socket /run/natgw/api.sock http://gateway/v1/status
natgw api GET /v1/status
```

"""


def document() -> dict[str, Any]:
    """The OpenAPI document of a gateway that does nothing."""
    sys.path.insert(0, str(ROOT))
    from api.http_app import build_app  # noqa: PLC0415
    from tests.gateway_kit import gateway  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as directory:
        made = gateway(Path(directory))
        try:
            return build_app(made.service).openapi()
        finally:
            made.service.close()


def page(api: dict[str, Any]) -> str:
    """The whole page."""
    said = api["info"]["description"]
    return "\n".join([HEAD + said, "", *_overview(api), *_operations(api), *_schemas(api)]).rstrip() + "\n"


def _each(api: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in api["paths"].items():
        yield from ((method, path, operations[method]) for method in METHODS if method in operations)


def _anchor(method: str, path: str) -> str:
    kept = "".join(c for c in f"{method} {path}".lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _first(text: str) -> str:
    return " ".join(text.split("\n\n", maxsplit=1)[0].split())


def _said(operation: dict[str, Any]) -> str:
    return _first(operation.get("description") or operation["summary"].capitalize())


def _overview(api: dict[str, Any]) -> Iterator[str]:
    yield from ("| request | what |", "|---|---|")
    for method, path, operation in _each(api):
        title = f"{method.upper()} {path}"
        yield f"| [`{title}`](#{_anchor(method, path)}) | {_said(operation)} |"
    yield ""


def _operations(api: dict[str, Any]) -> Iterator[str]:
    for method, path, operation in _each(api):
        yield from (f"## {method.upper()} {path}", "", operation.get("description", f"{_said(operation)}.").strip(), "")
        if parameters := operation.get("parameters", []):
            yield from ("| parameter | in | type | meaning |", "|---|---|---|---|")
            for given in parameters:
                needed = " (required)" if given.get("required") else ""
                meaning = given.get("description") or given["schema"].get("description", "")
                yield f"| `{given['name']}`{needed} | {given['in']} | {_type(given['schema'])} | {_first(meaning)} |"
            yield ""
        if body := operation.get("requestBody"):
            yield from _body(body)
        yield from ("| answer | meaning | body |", "|---|---|---|")
        for status, response in operation["responses"].items():
            yield f"| {status} | {_first(response['description'])} | {_contents(response)} |"
        yield ""


def _body(body: dict[str, Any]) -> Iterator[str]:
    for media, content in body["content"].items():
        yield from (f"Body ({media}): {_type(content['schema'])}", "")
        for name, example in content.get("examples", {}).items():
            shown = json.dumps(example["value"], indent=2)
            yield from (f"{example.get('summary', name)}:", "", "```json", shown, "```", "")


def _contents(response: dict[str, Any]) -> str:
    return "; ".join(
        f"{_type(content.get('schema', {}))} ({media})" for media, content in response.get("content", {}).items()
    )


def _schemas(api: dict[str, Any]) -> Iterator[str]:
    yield from ("# Objects", "")
    for name, schema in sorted(api["components"]["schemas"].items()):
        yield from (f"## {name}", "", schema.get("description", "").strip(), "")
        if properties := schema.get("properties"):
            required = set(schema.get("required", ()))
            yield from ("| field | type | default | meaning |", "|---|---|---|---|")
            for field, said in properties.items():
                default = (
                    "required" if field in required else f"`{json.dumps(said['default'])}`" if "default" in said else ""
                )
                yield f"| `{field}` | {_type(said)} | {default} | {_first(said.get('description', ''))} |"
            yield ""


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words, with links to objects."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    several = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if several:
        return " or ".join(dict.fromkeys(map(_type, several)))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    more = schema.get("additionalProperties")
    words = {
        "array": f"list of {_type(schema['items'])}" if schema.get("items") else "list",
        "object": f"map to {_type(more)}" if isinstance(more, dict) else "object",
    }
    kind = schema.get("type", "anything")
    return words.get(kind, kind)


def main() -> None:
    made = page(document())
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != made:
            sys.exit(f"{PAGE.relative_to(ROOT)} is not what the gateway says; run scripts/api_reference.py")
    else:
        PAGE.write_text(made)


if __name__ == "__main__":
    main()
