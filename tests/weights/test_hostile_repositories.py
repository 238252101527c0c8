"""What a hostile repository, or a hostile hub, cannot do: write outside the target, run code, or destroy weights."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmtp.weights.install import verify
from lmtp.weights.load import load
from lmtp.weights.manifest import WeightsError, read_manifest
from lmtp.weights.quantization import bytes_loaded
from tests.hub import TOKEN, Hub, Repository, serving
from tests.weights.conftest import Download
from tests.weights.helpers import contents, names_in, refusal, seal

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"

Prepare = Callable[[Repository, Path], None]


@dataclass(frozen=True)
class Attack:
    """Makes a repository hostile, given a directory outside the target and a file that its code would write.

    `refused` is part of the error, or empty where the download goes on without what is hostile.
    """

    name: str
    prepare: Prepare
    refused: str


def code(outside: Path) -> bytes:
    """Python code that leaves a file where it ran."""
    return f"open({str(outside / 'ran')!r}, 'w')\n".encode()


def index(*shards: str) -> Prepare:
    """The model is stored in shards of these names; `{outside}` in a name is the directory outside the target."""

    def prepare(repository: Repository, outside: Path) -> None:
        model = repository.files.pop("model.safetensors")
        names = [shard.format(outside=outside) for shard in shards]
        weight_map = {f"tensor{number}": name for number, name in enumerate(names)}
        repository.files[INDEX] = json.dumps({"weight_map": weight_map}).encode()
        repository.files |= {name: code(outside) if name.endswith(".py") else model for name in names}

    return prepare


def malformed(content: bytes) -> Prepare:
    """The index is this."""

    def prepare(repository: Repository, outside: Path) -> None:
        del repository.files["model.safetensors"]
        repository.files[INDEX] = content

    return prepare


def extra(*names: str) -> Prepare:
    """The repository has files of these names besides, each with code that leaves a mark."""

    def prepare(repository: Repository, outside: Path) -> None:
        repository.files |= {name.format(outside=outside): code(outside) for name in names}

    return prepare


def announced(name: str, **claims: object) -> Prepare:
    """The listing claims this of a file."""

    def prepare(repository: Repository, outside: Path) -> None:
        repository.announced[name] = claims

    return prepare


def served(name: str, content: bytes) -> Prepare:
    """The hub sends this in place of a file."""

    def prepare(repository: Repository, outside: Path) -> None:
        repository.served[name] = content

    return prepare


def headers(name: str, **values: str) -> Prepare:
    """The hub answers with these headers; `{outside}` is the directory outside the target."""

    def prepare(repository: Repository, outside: Path) -> None:
        repository.headers[name] = {
            key.replace("_", "-"): value.format(outside=outside) for key, value in values.items()
        }

    return prepare


def configured(**values: object) -> Prepare:
    """config.json says this besides."""

    def prepare(repository: Repository, outside: Path) -> None:
        before = json.loads(repository.files["config.json"])
        repository.files["config.json"] = json.dumps(before | values).encode()

    return prepare


def code_of_the_tokenizer(repository: Repository, outside: Path) -> None:
    settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    repository.files |= {"tokenizer_config.json": json.dumps(settings).encode(), "evil.py": code(outside)}


def another_file_in_its_place(repository: Repository, outside: Path) -> None:
    repository.files["other.json"] = b'{"model_type": "other"}'
    repository.headers["config.json"] = {"Location": "/store/org/tiny//other.json"}


def huge_index(repository: Repository, outside: Path) -> None:
    index(SHARD)(repository, outside)
    repository.announced[INDEX] = {"size": 10**10}


def remote_code(repository: Repository, outside: Path) -> None:
    config = json.loads(repository.files["config.json"])
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    repository.files["config.json"] = json.dumps(config).encode()
    repository.files["evil.py"] = code(outside)


def own_manifest(repository: Repository, outside: Path) -> None:
    manifest = {"source": "a", "revision": None, "files": {}, "model_args": {"trust_remote_code": True}}
    for name in ("manifest.json", "sealed.json", ".manifest.json", "files/manifest.json", ".download-1/sealed.json"):
        repository.files[name] = json.dumps(manifest).encode()
    remote_code(repository, outside)


def commit(value: str) -> Prepare:
    """The hub names the commit so."""

    def prepare(repository: Repository, outside: Path) -> None:
        repository.commit = value

    return prepare


def config(content: bytes, **claims: object) -> Prepare:
    """The config.json is this, and the listing claims so much of it."""

    def prepare(repository: Repository, outside: Path) -> None:
        repository.files["config.json"] = content
        repository.announced["config.json"] = claims

    return prepare


def adapter(**values: object) -> Prepare:
    """The repository is no model but an adapter with this configuration."""

    def prepare(repository: Repository, outside: Path) -> None:
        configuration = {"peft_type": "LORA", "base_model_name_or_path": "org/tiny", **values}
        written = json.dumps(configuration).replace("{outside}", str(outside))
        repository.files = {"adapter_config.json": written.encode(), "adapter_model.safetensors": b"!"}

    return prepare


PLAIN = "is not safe to install: its model.safetensors.index.json names"
MALFORMED = "has a malformed model.safetensors.index.json"
OTHER = {"sha256": "0" * 64, "size": 1, "pointerSize": 134}
KERNELS = "names attn_implementation '"
ATTACKS = [
    # Shard names
    Attack("shard in the parent directory", index("../escaped.safetensors"), PLAIN),
    Attack("shard with an absolute name", index("{outside}/escaped.safetensors"), PLAIN),
    Attack("shard that goes up from a subdirectory", index("a/../../escaped.safetensors"), PLAIN),
    Attack("shard in a nested directory", index("a/b/c.safetensors"), PLAIN),
    Attack("shard with backslashes", index("..\\escaped.safetensors"), PLAIN),
    Attack("shard with a drive", index("C:escaped.safetensors"), PLAIN),
    Attack("shard with NUL", index("a\0.safetensors"), PLAIN),
    Attack("shard with a line break", index("a\nTraceback: all is well.safetensors"), PLAIN),
    Attack("shard with terminal control", index("\x1b[2Ja.safetensors"), PLAIN),
    Attack("shard with a look-alike letter", index("mod\u0435l.safetensors"), PLAIN),
    Attack("shard with a full-width dot and slash", index("．．／a.safetensors"), PLAIN),
    Attack("shard with a lone surrogate", index("\ud800.safetensors"), MALFORMED),
    Attack("shard with a line break at its end", index(SHARD + "\n"), PLAIN),
    Attack("shard with a very long name", index("a" * 300 + ".safetensors"), PLAIN),
    Attack("shard that is hidden", index(".download-1.safetensors"), PLAIN),
    Attack("shard without a name", index(""), PLAIN),
    Attack("shard that is the manifest", index("manifest.json"), PLAIN),
    Attack("shard that is the seal", index("sealed.json"), PLAIN),
    Attack("shard that is code", index("evil.py"), PLAIN),
    Attack("shard that is a pickle", index("pytorch_model.bin"), PLAIN),
    Attack("shard of other casing", index("MANIFEST.JSON"), PLAIN),
    Attack("shard that is .gitignore", index(".gitignore"), PLAIN),
    Attack("shards that differ in case only", index("A.safetensors", "a.safetensors"), "cannot tell apart"),
    # The index
    Attack("index that is no JSON", malformed(b"\x80\x04pickle"), MALFORMED),
    Attack("index without weight_map", malformed(b"{}"), MALFORMED),
    Attack("index that is a list", malformed(b"[]"), MALFORMED),
    Attack("index whose weight_map is a string", malformed(b'{"weight_map": "evil.py"}'), MALFORMED),
    Attack("index whose weight_map holds numbers", malformed(b'{"weight_map": {"a": 1}}'), MALFORMED),
    Attack("index whose weight_map is empty", malformed(b'{"weight_map": {}}'), MALFORMED),
    Attack("index that is nested deeply", malformed(b'{"x":' * 100_000), MALFORMED),
    Attack("index that names what is not there", malformed(b'{"weight_map": {"a": "b.safetensors"}}'), "is incomplete"),
    Attack(
        "index that is said to be huge",
        huge_index,
        MALFORMED,
    ),
    # Other names
    Attack("manifests of its own", own_manifest, ""),
    Attack("code named by auto_map", remote_code, ""),
    Attack("code that looks like a licence", extra("notice.py", "LICENSE.py", "license.bin", "use_policy.so"), ""),
    Attack("files outside", extra("../config.json", "{outside}/config.json", "../../tokenizer.model"), ""),
    Attack("accompanying files with unsafe names", extra("..\\a.model", "a\0.model", "\u017fpecial.model"), ""),
    Attack("templates outside", extra("additional_chat_templates/../../a.jinja"), ""),
    Attack("licences that differ in case only", extra("license"), "cannot tell apart"),
    # What the hub says and sends
    Attack("a size beyond every disk", announced("model.safetensors", size=10**18), "are needed"),
    Attack("a negative size", announced("model.safetensors", size=-(10**18)), "cannot be verified"),
    Attack("a size that is text", announced("config.json", size="1"), "cannot be verified"),
    Attack("no checksum", announced("config.json", blobId=None), "cannot be verified"),
    Attack("a checksum that is a path", announced("config.json", blobId="../../config.json"), "cannot be verified"),
    Attack("other content of the same size", served("config.json", b"!"), "config.json arrived damaged"),
    Attack("other content of a shard", served("model.safetensors", b"!"), "model.safetensors arrived damaged"),
    Attack("content of another length than announced", headers("config.json", Content_Length="5"), "config.json"),
    Attack("another file in its place", another_file_in_its_place, "config.json arrived damaged"),
    Attack("a redirect to a local file", headers("config.json", Location="file:///etc/passwd"), ""),
    Attack("an ETag that is a path", headers("config.json", ETag='"/../../../../escaped"'), ""),
    Attack("a redirect to another host", headers("config.json", Location="http://127.0.0.1:9/evil"), ""),
    Attack("a shard that ends early", served("model.safetensors", b""), "model.safetensors"),
    Attack("a checksum of another shard", announced("model.safetensors", lfs=OTHER), "model.safetensors"),
    # The configuration
    Attack("a config.json that is huge", config(b"{}", size=10**10), "has a malformed config.json"),
    Attack("a config.json that is nested deeply", config(b'{"a":' * 100_000), "cannot read the config.json"),
    Attack("a config.json that is a list", config(b"[]"), "cannot read the config.json"),
    Attack("a config.json of numbers that are none", config(b'{"model_type": NaN}'), "the config.json"),
    Attack(
        "a config.json with terminal control", config(b'{"model_type": "\\u001b[2J\\nAll is well."}'), "the config.json"
    ),
    Attack(
        "a quantization with terminal control",
        config(b'{"model_type": "llama", "quantization_config": {"quant_method": "\\u001b[2J"}}'),
        "is quantized by",
    ),
    Attack("names with terminal control", extra("\x1b[2J.model", "a\nb.model", "tokenizer.model\r"), ""),
    Attack("a name that leads elsewhere", configured(_name_or_path="../../a", name_or_path="/etc/passwd"), ""),
    Attack("attention from a repository", configured(_attn_implementation="org/kernels"), KERNELS),
    Attack("attention by its other name", configured(attn_implementation="paged|org/kernels:run"), KERNELS),
    Attack("experts from a repository", configured(_experts_implementation="org/kernels"), "experts_implementation '"),
    Attack("code of the tokenizer's", code_of_the_tokenizer, ""),
    Attack("adapters of its own", extra("adapter/adapter_config.json", "adapters/a/adapter_model.safetensors"), ""),
    Attack("a cache of its own", extra(".cache/huggingface/download/config.json.metadata", ".cache/a.safetensors"), ""),
    Attack("startup code of Python's", extra("sitecustomize.py", "usercustomize.py", "a.pth", "__init__.py"), ""),
    Attack("a redirect in circles", headers("config.json", Location="/org/tiny/resolve/main/config.json"), ""),
    # Adapters
    Attack("an adapter of a local directory", adapter(base_model_name_or_path="{outside}"), "which is no repository"),
    Attack("an adapter of a web page", adapter(base_model_name_or_path="http://a/b/c"), "which is no repository"),
    Attack("an adapter of a hostile revision", adapter(revision="\x1b[2J\n"), "is no revision"),
    Attack("an adapter of a path as revision", adapter(revision="../../../escaped"), "has no revision"),
    Attack("an adapter that imports a module", adapter(megatron_config={}, megatron_core="evil"), ""),
    Attack("a commit that is a path", commit("../../escaped"), "does not answer as a Hugging Face hub"),
    Attack("a commit that is empty", commit(""), "does not answer as a Hugging Face hub"),
]


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below the directory, hidden or not."""
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_an_attack_writes_nothing_outside_runs_nothing_and_leaves_the_old_weights(
    attack: Attack, hub: Hub, download: Download, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.chdir(outside)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    repository = hub.repositories["org/tiny"]
    before = contents(weights)
    attack.prepare(repository, outside)

    error = None
    try:
        download("org/tiny", weights)
    except WeightsError as refused:
        error = str(refused)

    if error is None:
        assert not attack.refused
        manifest = read_manifest(weights)
        assert not manifest.trust_remote_code
        assert names_in(weights) == {*manifest.files, "manifest.json", ".gitignore"}
        assert {*manifest.files} <= {*before, "LICENSE", "chat_template.jinja"}
        verify(weights)
    else:
        assert attack.refused in error
        assert error.isprintable()
        assert len(error) < 400
        assert contents(weights) == before
    if any("evil" in (weights / name).read_text() for name in ("config.json", "tokenizer_config.json")):
        # An auto_map: nothing follows it.
        with pytest.raises(WeightsError, match="code of its own"):
            load(weights)
    else:
        load(weights)
    assert tree(outside) == {}
    assert names_in(tmp_path) <= {"outside", "weights", "home", "modules"}
    assert not tree(tmp_path / "modules")


@pytest.mark.parametrize("attack", ATTACKS[:23], ids=[attack.name for attack in ATTACKS[:23]])
def test_a_directory_with_such_an_index_is_refused_too(
    attack: Attack, download: Download, tiny: Path, weights: Path, tmp_path: Path
) -> None:
    outside, source = tmp_path / "outside", tmp_path / "source"
    outside.mkdir()
    source.mkdir()
    repository = Repository({path.name: path.read_bytes() for path in tiny.iterdir()})
    attack.prepare(repository, outside)
    for name, content in repository.files.items():
        if "/" not in name and "\0" not in name and 0 < len(name) < 200 and "\ud800" not in name:
            (source / name).write_bytes(content)
    before = contents(weights)
    with pytest.raises(WeightsError, match=attack.refused):
        download(source, weights)
    assert contents(weights) == before
    assert tree(outside) == {}


def header(length: int, content: bytes) -> bytes:
    return length.to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "shard",
    [
        b"",
        b"\x01",
        header(2**63, b"{}"),
        header(10**6, b"{}"),
        header(0, b""),
        header(2, b"[]"),
        header(2, b"\xff\xff"),
        header(500_000, b'{"a":' * 100_000),
        header(68, b'{"a":{"dtype":"F32","shape":[999999999],"data_offsets":[0,9999999]}}'),
    ],
    ids=["empty", "short", "beyond 64 bits", "beyond the file", "none", "list", "no text", "deep", "offsets"],
)
def test_a_shard_whose_header_lies_is_refused_when_it_is_loaded(shard: bytes, weights: Path) -> None:
    (weights / "model.safetensors").write_bytes(shard)
    seal(weights)
    with refusal("Transformers cannot load org/old from"):
        load(weights, "float32", "cpu")
    if shard != header(2, b"[]"):  # which is a table of no tensors, to safetensors
        with refusal("model.safetensors is malformed"):
            bytes_loaded([weights / "model.safetensors"], 4, None, None)


def test_code_is_taken_from_plain_names_only_even_where_it_is_trusted(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    extra(
        "a b.py", "../evil.py", "{outside}/evil.py", ".evil.py", "a/../evil.py", "evil.PY", "a\0.py", "nested/good.py"
    )(hub.repositories["org/tiny"], outside)
    download("org/tiny", tmp_path / "weights", trust_remote_code=True)
    manifest = read_manifest(tmp_path / "weights")
    assert {name for name in manifest.files if name.lower().endswith(".py")} == {"modeling_tiny.py", "nested/good.py"}
    assert tree(outside) == {}


def test_a_shard_that_is_code_is_refused_even_where_code_is_trusted(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    index("evil.py")(hub.repositories["org/tiny"], tmp_path)
    with pytest.raises(WeightsError, match=PLAIN):
        download("org/tiny", tmp_path / "weights", trust_remote_code=True)
    assert not os.path.lexists(tmp_path / "weights" / "evil.py")


def test_an_interrupted_first_run_does_not_make_a_repositorys_manifest_ours(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    target, repository = tmp_path / "weights", hub.repositories["org/tiny"]
    index(SHARD, "manifest.json")(repository, tmp_path)
    own_manifest(repository, tmp_path)
    for _ in range(2):  # The second run finds what the first one left.
        with pytest.raises(WeightsError, match=PLAIN):
            download("org/tiny", target)
        with pytest.raises(WeightsError, match="No weights in"):
            load(target)
    assert [path.name.startswith(".download-") for path in target.iterdir()] == [True]
    assert not list(target.rglob("manifest.json"))
    assert not list(target.rglob("*.py"))
    assert not (tmp_path / "ran").exists()


def test_a_token_is_sent_to_the_hub_and_to_no_other_host(
    hub: Hub, download: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repository = hub.repositories["org/tiny"]
    repository.gated = True
    name = "model.safetensors"
    content = repository.files[name]
    with serving(Hub({"org/tiny": repository})) as other:
        repository.headers[name] = {
            "Location": f"{other.address}/store/org/tiny//{name}",
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        download("org/tiny", tmp_path / "weights")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert {*other.requests} == {f"/store/org/tiny//{name}"}
    assert other.tokens == set()


def test_a_link_in_a_directory_of_models_is_copied_as_the_file_it_names(
    download: Download, tiny: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny.iterdir():
        (source / path.name).symlink_to(path)
    (source / "vocab.json").symlink_to(tmp_path / "absent")
    download(source, tmp_path / "weights")
    assert not any(path.is_symlink() for path in (tmp_path / "weights").iterdir())
    assert not (tmp_path / "weights" / "vocab.json").exists()
