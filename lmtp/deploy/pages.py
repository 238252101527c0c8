"""The texts of a build directory: README.md, push, .dockerignore."""

from string import Template

from lmtp.deploy.models import Model
from lmtp.weights.manifest import Manifest

DOCKERIGNORE = """\
# Everything here goes into the image but what is for people.
README.md
push
**/__pycache__
"""

DEMO_TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"

_PUSH = Template("""\
#!/bin/sh
# Build the image of this directory and push it; options go to `cog push`. Written by script/models build.
set -eu
cd "$$(dirname "$$0")"

if ! command -v cog > /dev/null; then
    echo "push: there is no cog: install it, see https://github.com/replicate/cog#install." >&2
    exit 1
fi
version=$$(cog --version | sed -n 's/[^0-9]*\\([0-9][0-9.]*\\).*/\\1/p')
if [ "$$(printf '0.21\\n%s\\n' "$$version" | sort -V | head -n 1)" != 0.21 ]; then
    echo "push: cog $$version is too old: install 0.21 or newer." >&2
    exit 1
fi

# Docker's configuration names the registries that it is logged in to, or the program that keeps them.
config=$${DOCKER_CONFIG:-$$HOME/.docker}/config.json
helper=$$(sed -n 's/.*"credsStore": *"\\([^"]*\\)".*/\\1/p' "$$config" 2> /dev/null || true)
if ! { cat "$$config"; [ ! "$$helper" ] || "docker-credential-$$helper" list; } 2> /dev/null | grep -q '"r8\\.im"'; then
    echo "push: not logged in to r8.im: run cog login." >&2
    exit 1
fi

# Weights in a layer of their own are pushed once. The wheels bring CUDA, so the base image need not.
known=$$(cog push --help 2>&1)
for option in --separate-weights --use-cuda-base-image=false; do
    case $$known in *"$${option%%=*}"*) set -- "$$option" "$$@" ;; esac
done
exec cog push $image "$$@"
""")

_README = Template("""\
# $name

$what, with control over every token. Written by `script/models build`: change models.toml instead.

| | |
| --- | --- |
| image | `$image` |
| model | `$source` at `$revision` |
$rows
## Push

The model has to exist on Replicate. Create it once, on the website or so:

    curl -s https://api.replicate.com/v1/models -H "Authorization: Bearer $$REPLICATE_API_TOKEN" \\
      -H "Content-Type: application/json" \\
      -d '{"owner": "$owner", "name": "$name", "visibility": "$visibility", "hardware": "$hardware"}'

Then, after `cog login`, run `./push`.

## Query

Set `REPLICATE_API_TOKEN`. The first call after a pause waits for the model to start.

### curl

    VERSION=$$(curl -s https://api.replicate.com/v1/models/$owner/$name \\
      -H "Authorization: Bearer $$REPLICATE_API_TOKEN" | jq -r .latest_version.id)
    curl -s https://api.replicate.com/v1/predictions -H "Authorization: Bearer $$REPLICATE_API_TOKEN" \\
      -H "Content-Type: application/json" -H "Prefer: wait" \\
      -d '{"version": "'$$VERSION'", "input": {"prompt": "What is the capital of France?"$input}}' | jq -j '.output[]'

### Python

```python
import replicate

version = replicate.models.get("$owner/$name").latest_version.id
for text in replicate.stream(f"$owner/$name:{version}", input={"prompt": "What is the capital of France?"$input}):
    print(text, end="")
```

### JavaScript

```javascript
import Replicate from "replicate";

const replicate = new Replicate();
const version = (await replicate.models.get("$owner", "$name")).latest_version.id;
const input = { prompt: "What is the capital of France?"$input };
for await (const { event, data } of replicate.stream(`$owner/$name:$${version}`, { input })) {
  if (event === "output") process.stdout.write(data);
}
```

### LMQL

```python
import lmql

model = lmql.model("$name", endpoint="replicate:$owner/$name", tokenizer="$tokenizer")


@lmql.query(model=model)
def sentiment():
    '''lmql
    "Review: We had a great stay. Hiking in the mountains was fabulous.\\n"
    "Q: What is the underlying sentiment of this review and why?\\n"
    "A:[ANALYSIS]" where STOPS_AT(ANALYSIS, "\\n") and len(TOKENS(ANALYSIS)) < 60
    "In a word, the review is[CLASSIFICATION]" distribution CLASSIFICATION in [" positive", " negative", " neutral"]
    '''


print(sentiment().variables["P(CLASSIFICATION)"])
```
""")


def push(image: str) -> str:
    """The script that pushes the image."""
    return _PUSH.substitute(image=image)


def readme(model: Model, manifest: Manifest) -> str:
    """How to create, push and query the model."""
    rows = {
        "quantization": model.model_args.get("load_in", ""),
        "adapter, merged": _shown(model.adapter),
        "adapters": ", ".join(f"`{name}` ({_shown(source)})" for name, source in model.adapters.items()),
        "hardware": model.hardware,
        "size": f"{manifest.bytes / 1e6:,.0f} MB",
    }
    first = next(iter(model.adapters), "")
    return _README.substitute(
        name=model.name,
        owner=model.owner,
        image=model.image,
        what="The demo model, SmolLM2-135M-Instruct" if manifest.source == "demo" else manifest.source,
        source=manifest.source,
        revision=manifest.revision,
        rows="".join(f"| {key} | {value} |\n" for key, value in rows.items() if value),
        visibility=model.visibility,
        hardware=model.hardware or "gpu-l40s",
        input=f', "adapter": "{first}"' if first else "",
        tokenizer=DEMO_TOKENIZER if manifest.source == "demo" else manifest.source,
    )


def _shown(source: object) -> str:
    return f"`{source}`" if source else ""
