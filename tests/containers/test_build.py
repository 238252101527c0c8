"""script/models build: directories that share their weights, and change only where models.toml or a repository does."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import LlamaForCausalLM

from lmtp.deploy import DeployError, commands, tree
from lmtp.deploy.commands import Workshop
from lmtp.weights.load import load
from lmtp.weights.manifest import Adapter, WeightsError, read_manifest
from tests.containers.conftest import MODELS, Build
from tests.hub import Hub, Repository
from tests.server import ROOT
from tests.tiny import VOCABULARY, own_logits
from tests.weights.helpers import NEEDED

SCHEMA = json.loads((ROOT / "tests/data/cog_config_schema_v1.0.json").read_text())
SCORE: list[object] = ["SCORE", {"stream_id": 2, "prompt": [1, 2, 3], "scored": [4]}]
PREFIX, FIRST, _ = re.split(r"(?=\[models)", MODELS)
PLAIN = PREFIX + '[models.plain]\nhuggingface.repo = "org/tiny"\n'


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every path below the directory with its inode and the time of its last change."""
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in directory.rglob("*")}


def separated(directory: Path, large: int) -> list[str]:
    """The directories that Cog takes for weights: they have large files, and no path of a .py file begins with theirs.

    https://github.com/replicate/cog/blob/main/pkg/weightslegacy/weights.go
    """
    files = [path for path in directory.rglob("*") if not path.is_dir()]
    names = {path: path.relative_to(directory).as_posix() for path in files}
    found = {os.path.dirname(names[path]) for path in files if path.lstat().st_size >= large}
    return sorted(f for f in found if not any(name.startswith(f) for name in names.values() if name.endswith(".py")))


def ask(directory: Path, *operations: list[object]) -> list[dict[str, Any]]:
    """The replies' documents of the directory's own predictor to these operations."""
    program = """
import asyncio, sys, lmtp.protocol, predict
predictor = predict.Predictor()
predictor.setup()
operations = lmtp.protocol.parse_batch(sys.argv[1], predictor.engine.longest_input)
prediction = asyncio.run(predictor.engine.predict(operations))
print("".join(lmtp.protocol.encode(replies) for replies in prediction), end="", file=sys.stderr)
predictor.engine.stop()
"""
    settings = {"OMP_NUM_THREADS": "1", "COMPILE": "off", "KV_CACHE_GB": "0.1", "DTYPE": "float32", "PYTHONPATH": "."}
    command = [sys.executable, "-c", program, json.dumps(operations)]
    ended = subprocess.run(
        command, cwd=directory, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line.partition(" ") for line in ended.stderr.splitlines()]
    return [json.loads(document) for kind, _, document in lines if kind in ("TOKEN", "MSG")]


def edit(shop: Workshop, text: str) -> None:
    shop.file.write_text(text)


class TestTwoVariants:
    def test_share_the_bytes_of_their_repository(self, build: Build, shop: Workshop, repositories: Hub) -> None:
        printed = build()
        commit = repositories.repositories["org/tiny"].commit
        assert f"work/tiny--4bit is built: org/tiny at {commit}." in printed
        quantized, adapted = (shop.work / name / "weights" for name in ("tiny--4bit", "tiny--lora"))
        stored = shop.store / f"org--tiny@{commit}" / "model.safetensors"
        assert stored.stat().st_nlink == 3
        assert stored.samefile(quantized / "model.safetensors")
        assert stored.samefile(adapted / "model.safetensors")
        size = stored.stat().st_size
        assert repositories.sent["model.safetensors"] == size

    def test_are_loaded_as_their_sections_say(self, build: Build, shop: Workshop, repositories: Hub) -> None:
        build()
        quantized, adapted = (read_manifest(shop.work / name / "weights") for name in ("tiny--4bit", "tiny--lora"))
        assert quantized.model_args == {"trust_remote_code": False, "load_in": "4bit"}
        assert adapted.model_args == {"trust_remote_code": False}
        assert (quantized.adapter, adapted.adapter) == (None, Adapter("org/lora", "a" * 40))
        assert {*quantized.files} >= NEEDED
        assert {*adapted.files} - {*quantized.files} == {
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        }
        assert quantized.source == "org/tiny"
        assert quantized.revision == repositories.repositories["org/tiny"].commit

    def test_a_second_build_changes_nothing_and_says_so(self, build: Build, shop: Workshop, repositories: Hub) -> None:
        build()
        before, asked = snapshot(shop.file.parent), len(repositories.requests)
        assert build() == "work/tiny--4bit is up to date.\nwork/tiny--lora is up to date.\n"
        assert snapshot(shop.file.parent) == before
        assert len(repositories.requests) == asked

    def test_a_dry_run_says_what_would_change_and_changes_nothing(
        self, build: Build, shop: Workshop, repositories: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        commands.preview(shop, [])
        assert capsys.readouterr().out.splitlines() == [
            "work/tiny--4bit is not built: it would be built, after fetching org/tiny at main.",
            "work/tiny--lora is not built: it would be built, after fetching org/tiny at main, org/lora at main.",
        ]
        assert (os.listdir(shop.file.parent), repositories.requests) == (["models.toml"], [])
        build()
        before, asked = snapshot(shop.file.parent), len(repositories.requests)
        commands.preview(shop, [])
        assert capsys.readouterr().out.splitlines() == [
            "work/tiny--4bit is up to date: nothing would change.",
            "work/tiny--lora is up to date: nothing would change.",
        ]
        edit(shop, shop.file.read_text().replace("KV_CACHE_GB = 2", "KV_CACHE_GB = 3"))
        commands.preview(shop, ["tiny--4bit"])
        assert capsys.readouterr().out == "work/tiny--4bit is changed in cog.yaml: it would be built.\n"
        edit(shop, MODELS)
        after = snapshot(shop.file.parent)
        del before[str(shop.file)], after[str(shop.file)]
        assert after == before
        assert len(repositories.requests) == asked


class TestADirectory:
    def test_has_the_projects_code_as_copies(self, build: Build, shop: Workshop) -> None:
        build("tiny--4bit")
        for name in ("predict.py", "lmtp/engine/engine.py", "lmtp/weights/load.py"):
            copy = shop.work / "tiny--4bit" / name
            assert copy.read_bytes() == (ROOT / name).read_bytes()
            assert not copy.samefile(ROOT / name)
        assert not (shop.work / "tiny--4bit" / "lmtp" / "deploy").exists()

    def test_has_a_cog_yaml_that_cog_takes(self, build: Build, shop: Workshop) -> None:
        edit(shop, MODELS.replace("gpu-t4", "cpu"))
        build()
        for name, gpu in (("tiny--4bit", False), ("tiny--lora", True)):
            config = yaml.safe_load((shop.work / name / "cog.yaml").read_text())
            jsonschema.Draft7Validator(SCHEMA).validate(config)
            assert config["image"] == f"r8.im/acct/{name}"
            assert config["build"]["gpu"] is gpu
            assert ("cuda" in config["build"]) is gpu  # Cog knows no CUDA for this torch by itself
            assert ("KV_CACHE_GB=2" in config["environment"]) is (name == "tiny--4bit")
            assert "MALLOC_ARENA_MAX=1" in config["environment"]
            assert (
                config["build"]["sdk_version"]
                == yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["sdk_version"]
            )

    def test_is_described_as_the_project_is(self) -> None:
        jsonschema.Draft7Validator(SCHEMA).validate(yaml.safe_load((ROOT / "cog.yaml").read_text()))

    def test_needs_only_what_its_model_does(self, build: Build, shop: Workshop, repositories: Hub) -> None:
        edit(shop, MODELS + PLAIN.removeprefix(PREFIX))
        build()
        own = {
            name: (shop.work / name / "requirements.txt").read_text() for name in ("tiny--4bit", "tiny--lora", "plain")
        }
        assert {name for name, text in own.items() if "bitsandbytes==" in text} == {"tiny--4bit"}
        assert {name for name, text in own.items() if "peft==" in text} == {"tiny--lora"}
        lines = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"}
        assert set(own["plain"].splitlines()[1:]) == {x for x in lines if not x.startswith(("gguf", "sentencepiece"))}
        repositories.repositories["org/tiny"].files["tokenizer.model"] = b"sentencepiece"
        repositories.repositories["org/tiny"].commit = "b" * 40
        build("plain", update=True)
        assert "sentencepiece==" in (shop.work / "plain" / "requirements.txt").read_text()

    def test_answers_predictions_as_its_model_does(self, build: Build, shop: Workshop, tiny: Path, lora: Path) -> None:
        build("tiny--lora")
        directory = shop.work / "tiny--lora"
        info, score = ask(directory, ["MODEL_INFO", {"stream_id": 1}], SCORE)
        assert (info["stream_id"], info["model_info"]["vocabulary"]) == (1, VOCABULARY)
        model: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny), lora)
        expected = own_logits(model, [1, 2, 3, 4])[2].log_softmax(-1)[4].item()
        assert score["logprob"] == pytest.approx(expected, abs=1e-4)

    def test_is_repaired_where_it_was_changed_and_keeps_cogs_cache(self, build: Build, shop: Workshop) -> None:
        build("tiny--4bit")
        directory = shop.work / "tiny--4bit"
        (directory / ".cog").mkdir()
        (directory / ".cog" / "openapi_schema.json").write_text("{}")
        (directory / "lmtp" / "__pycache__").mkdir()
        (directory / "lmtp" / "__pycache__" / "x.pyc").touch()
        assert build("tiny--4bit") == "work/tiny--4bit is up to date.\n"
        (directory / "predict.py").write_text("")
        (directory / "weights" / "config.json").unlink()
        (directory / "lmtp" / "gone.py").touch()
        (state,) = commands.containers(shop, ["tiny--4bit"])
        assert state.state == "changed in lmtp/gone.py, predict.py, weights/config.json"
        assert "is built" in build("tiny--4bit")
        assert not commands.containers(shop, ["tiny--4bit"])[0].changes
        assert (directory / ".cog" / "openapi_schema.json").exists()

    def test_is_copied_once_where_links_are_not_possible(
        self, build: Build, shop: Workshop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        linked = os.link

        def link(source: Path, path: Path) -> None:
            if shop.store in source.parents:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            linked(source, path)

        monkeypatch.setattr(os, "link", link)
        build("tiny--4bit")
        weights = shop.work / "tiny--4bit" / "weights" / "model.safetensors"
        (stored,) = shop.store.glob("*/model.safetensors")
        copy = weights.stat().st_ino
        assert weights.read_bytes() == stored.read_bytes()
        assert copy != stored.stat().st_ino
        assert build("tiny--4bit") == "work/tiny--4bit is up to date.\n"
        edit(shop, MODELS.replace("KV_CACHE_GB = 2", "KV_CACHE_GB = 3"))
        assert "is built" in build("tiny--4bit")
        assert (weights.stat().st_ino, weights.stat().st_nlink) == (copy, 1)


class TestCommits:
    def test_are_locked_until_they_are_updated(self, build: Build, shop: Workshop, repositories: Hub) -> None:
        build()
        tiny = repositories.repositories["org/tiny"]
        first, tiny.commit = tiny.commit, "b" * 40
        assert json.loads(shop.lock.read_text()) == {"org/lora@main": "a" * 40, "org/tiny@main": first}
        assert "is built" not in build()
        assert build("tiny--4bit", update=True).endswith(f"work/tiny--4bit is built: org/tiny at {'b' * 40}.\n")
        assert json.loads(shop.lock.read_text())["org/tiny@main"] == "b" * 40
        assert read_manifest(shop.work / "tiny--4bit" / "weights").revision == "b" * 40
        assert commands.containers(shop, ["tiny--lora"])[0].state.startswith("changed in README.md, weights/")

    def test_of_repositories_that_are_no_longer_named_leave_the_lock(
        self, build: Build, shop: Workshop, repositories: Hub
    ) -> None:
        build()
        edit(shop, PREFIX + FIRST)
        build()
        assert set(json.loads(shop.lock.read_text())) == {"org/tiny@main"}

    def test_that_are_given_need_no_lock(self, build: Build, shop: Workshop, repositories: Hub) -> None:
        commit = repositories.repositories["org/tiny"].commit
        edit(shop, f'{PLAIN}huggingface.version = "{commit}"\n')
        build()
        assert not shop.lock.exists()
        assert (shop.work / "plain" / "weights" / "manifest.json").exists()

    @pytest.mark.parametrize(
        ("text", "message"), [("{", "is damaged"), ('{"org/tiny@main": "main"}', "has 'main', which is no commit")]
    )
    def test_of_a_damaged_lock_are_not_used(self, build: Build, shop: Workshop, text: str, message: str) -> None:
        shop.lock.write_text(text)
        with pytest.raises(DeployError, match=message):
            build()


class TestWhatCannotBeBuilt:
    def test_is_refused_before_the_network_is_touched(self, build: Build, shop: Workshop, repositories: Hub) -> None:
        edit(shop, MODELS + "[models.third]\n")
        with pytest.raises(DeployError, match=r"models.toml, line 12: third has no huggingface.repo"):
            build("tiny--4bit")
        assert repositories.requests == []
        assert os.listdir(shop.file.parent) == ["models.toml"]

    def test_leaves_nothing_half_built_and_is_resumed(self, build: Build, shop: Workshop, repositories: Hub) -> None:
        repositories.cuts["model.safetensors"], repositories.down_after_cut = 10_000, True
        with pytest.raises(WeightsError):
            build()
        assert [path.name for path in shop.work.iterdir()] == [".store"]
        repositories.down, repositories.down_after_cut = False, False
        for thread in threading.enumerate():
            if thread.name.startswith("fetch"):
                thread.join()  # script/models exits here, and these end with it.
        fetched = repositories.sent["config.json"]
        build()
        assert repositories.sent["config.json"] == fetched > 0
        assert all(each.current for each in commands.containers(shop, []))

    def test_leaves_the_old_directory_as_it_was(
        self, build: Build, shop: Workshop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build("tiny--4bit")
        before = snapshot(shop.work / "tiny--4bit")
        edit(shop, MODELS.replace("KV_CACHE_GB = 2", "KV_CACHE_GB = 3"))

        def full(source: object, path: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "link", full)
        with pytest.raises(WeightsError, match="No space left on device"):
            build("tiny--4bit")
        assert snapshot(shop.work / "tiny--4bit") == before
        assert {path.name for path in shop.work.iterdir()} == {".store", "tiny--4bit"}

    def test_of_an_adapter_names_the_key_to_set(self, build: Build, shop: Workshop) -> None:
        edit(shop, PLAIN.replace("org/tiny", "org/lora"))
        with pytest.raises(
            DeployError, match=r"org/lora holds an adapter: set huggingface.repo = 'org/tiny' and adapters = 'org/lora'"
        ):
            build()
        assert not (shop.work / "plain").exists()

    def test_because_of_an_adapter_beside_it_is_built_once_that_is_chosen(
        self, build: Build, shop: Workshop, repositories: Hub
    ) -> None:
        repositories.repositories["org/tiny"].files |= repositories.repositories["org/lora"].files
        edit(shop, PLAIN)
        with pytest.raises(DeployError, match="plain: org/tiny holds an adapter: set adapters = 'org/tiny'"):
            build()
        edit(shop, PLAIN + 'adapters = "org/tiny"\n')
        build()
        manifest = read_manifest(shop.work / "plain" / "weights")
        assert manifest.adapter == Adapter("org/tiny", str(manifest.revision))
        assert {*manifest.files} > {"model.safetensors", "adapter/adapter_model.safetensors"}

    @pytest.mark.parametrize(
        ("config", "extra", "message"),
        [
            ({}, "config.attn_implementatio = 'eager'\n", "takes no argument 'attn_implementatio': did you mean"),
            ({"quantization_config": {"quant_method": "gptq"}}, "quantization = '4bit'\n", "is quantized already"),
            ({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}, "", "run `script/models build plain` with `config.trust"),
            ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "adapters.a = 'org/lora'\n", "serves no named adapters"),
        ],
    )  # fmt: skip
    def test_is_refused_before_its_weights_are_fetched(
        self, build: Build, shop: Workshop, repositories: Hub, config: dict[str, object], extra: str, message: str
    ) -> None:
        tiny = repositories.repositories["org/tiny"]
        tiny.files["config.json"] = json.dumps(json.loads(tiny.files["config.json"]) | config).encode()
        edit(shop, PLAIN + extra)
        with pytest.raises(WeightsError, match=message):
            build()
        assert repositories.sent["model.safetensors"] == 0
        assert [path.name for path in shop.work.iterdir()] == [".store"]

    @pytest.mark.parametrize(
        ("config", "extra"),
        [
            ({}, "quantization = '4bit'\n"),
            ({"quantization_config": {"load_in_4bit": True}}, ""),
            ({"auto_map": {}}, "quantization = '4bit'\nconfig.trust_remote_code = true\n"),
        ],
    )
    def test_is_refused_before_its_weights_are_fetched_where_an_adapter_is_not_added_to_quantized_ones(
        self, build: Build, shop: Workshop, repositories: Hub, config: dict[str, object], extra: str
    ) -> None:
        for name, file, changes in (
            ("org/tiny", "config.json", config),
            ("org/lora", "adapter_config.json", {"use_dora": True}),
        ):
            files = repositories.repositories[name].files
            files[file] = json.dumps(json.loads(files[file]) | changes).encode()
        edit(shop, PLAIN + extra + 'adapters = "org/lora"\n')
        with pytest.raises(WeightsError, match="org/lora uses DoRA, which is not added to quantized weights"):
            build()
        assert repositories.sent["model.safetensors"] == 0


def test_code_of_the_models_own_lies_apart_from_its_weights(
    build: Build, shop: Workshop, repositories: Hub, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    files = dict(repositories.repositories["org/tiny"].files)
    del files["modeling_tiny.py"]
    files["custom.py"] = (
        b"from transformers import LlamaConfig, LlamaForCausalLM\n"
        b"class CustomConfig(LlamaConfig):\n    model_type = 'custom'\n"
        b"class CustomModel(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    )
    custom = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    config = json.loads(files["config.json"]) | {"model_type": "custom", "auto_map": custom}
    files["config.json"] = json.dumps(config).encode()
    repositories.repositories["org/custom"] = Repository(files)
    edit(shop, PLAIN + '[models.own]\nhuggingface.repo = "org/custom"\nconfig.trust_remote_code = true\n')
    build()
    own, plain = shop.work / "own", shop.work / "plain"
    large = (own / "weights" / "model.safetensors").stat().st_size
    assert separated(own, large) == separated(plain, large) == ["weights"]
    assert "WEIGHTS_DIR=model" in yaml.safe_load((own / "cog.yaml").read_text())["environment"]
    assert os.readlink(own / "model" / "model.safetensors") == "../weights/model.safetensors"
    loaded = load(own / "model", "float32", "cpu")
    assert type(loaded.model).__name__ == "CustomModel"
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(tokens).logits, LlamaForCausalLM.from_pretrained(tiny)(tokens).logits)
    assert "is built" not in build()


class TestClean:
    def test_removes_a_directory_and_the_weights_that_only_it_used(
        self, build: Build, shop: Workshop, capsys: pytest.CaptureFixture[str]
    ) -> None:
        build()
        commands.clean(shop, ["tiny--lora"], dry_run=True)
        assert "would be removed" in capsys.readouterr().out
        assert (shop.work / "tiny--lora").exists()
        commands.clean(shop, ["tiny--lora"])
        assert capsys.readouterr().out.splitlines() == [
            "work/tiny--lora is removed.",
            f"work/.store/org--lora@{'a' * 40}+adapter is removed.",
        ]
        assert commands.containers(shop, ["tiny--4bit"])[0].current
        (shop.work / ".tiny--lora.new").mkdir()  # as a build that was killed leaves it
        commands.clean(shop, [])
        assert [*shop.store.iterdir(), *shop.work.glob("*tiny*")] == []

    def test_removes_nothing_that_it_did_not_build(
        self, build: Build, shop: Workshop, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (shop.work / "mine").mkdir(parents=True)
        (shop.work / "mine" / "cog.yaml").write_text("predict: predict.py:Predictor\n")
        commands.clean(shop, [])
        assert (shop.work / "mine").exists()
        assert capsys.readouterr().out == "There is nothing to remove.\n"
        with pytest.raises(DeployError, match="There is no build directory work/mine: none is there"):
            commands.clean(shop, ["mine"])

    def test_removes_links_but_not_what_they_lead_to(
        self, build: Build, shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        disk = tmp_path / "disk"
        (disk / "photos").mkdir(parents=True)
        shop.work.mkdir()
        shop.store.symlink_to(disk)
        build("tiny--4bit")
        (shop.work / "tiny--4bit").rename(disk / "moved")
        (shop.work / "tiny--4bit").symlink_to(disk / "moved")
        commands.clean(shop, [])
        assert not (shop.work / "tiny--4bit").is_symlink()
        assert sorted(path.name for path in disk.iterdir()) == ["moved", "photos"]


def test_the_list_shows_commits_and_states(
    build: Build, shop: Workshop, capsys: pytest.CaptureFixture[str], repositories: Hub
) -> None:
    build("tiny--4bit")
    commands.listing(shop, [])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "repository", "commit", "quantization", "adapters", "state"]
    assert first.split() == ["tiny--4bit", "org/tiny", "0123456789ab", "4bit", "-", "up", "to", "date"]
    assert second.split()[:3] == ["tiny--lora", "org/tiny", "0123456789ab"]
    commands.listing(shop, ["tiny--lora"], as_json=True)
    (model,) = json.loads(capsys.readouterr().out)
    assert model["commit"] == repositories.repositories["org/tiny"].commit
    assert (model["image"], model["state"]) == ("r8.im/acct/tiny--lora", "not built")


def test_the_script_says_what_is_wrong_and_reads_the_file_it_is_given(shop: Workshop) -> None:
    edit(shop, MODELS.replace("quantization", "quantisation"))
    command = [sys.executable, str(ROOT / "script/models"), "build", "--file", str(shop.file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        f"script/models: {shop.file}, line 5: quantisation is unknown: did you mean quantization?\n"
    )


def test_the_script_names_what_it_cannot_read(shop: Workshop) -> None:
    edit(shop, PLAIN)
    shop.work.touch()  # where its directory should be
    command = [sys.executable, str(ROOT / "script/models"), "list", "--file", str(shop.file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"script/models: {shop.store}/")
    assert ended.stderr.endswith(": Not a directory.\n")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_a_directory_is_replaced(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter").touch()
    (tmp_path / "x").symlink_to(tmp_path / "mine")
    tree.replace(tmp_path / "x", {"a": b"1"})
    assert (tmp_path / "x" / "a").read_bytes() == b"1"
    assert not (tmp_path / "x").is_symlink()
    assert not there or (tmp_path / "mine" / "letter").exists()


def test_a_directory_is_compared_by_what_its_files_hold(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"12")
    wanted: tree.Tree = {"a/b": b"#!/bin/sh\n", "c": "a/b", "d": tmp_path / "kept"}
    tree.replace(tmp_path / "x", wanted)
    assert tree.differences(wanted, tmp_path / "x") == []
    assert os.access(tmp_path / "x" / "a" / "b", os.X_OK)
    (tmp_path / "x" / "d").unlink()
    (tmp_path / "x" / "d").write_bytes(b"21")
    (tmp_path / "x" / "e").touch()
    assert tree.differences({**wanted, "c": "d"}, tmp_path / "x") == ["c", "d", "e"]
