"""Damaged and forged files end in one line, or in the work being done again; never in a traceback or a dead search."""

import json
import signal

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexi_core import FlexiError
from flexi_core.runtime.file_model import FileModel
from flexi_core.runtime.unet_config import unet_arguments
from flexi_core.tensor_files import save_tensors
from search_tools import console
from search_tools.backends.comfyui import workflow
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings, TeacherStore, _checksum
from search_tools.cli import app
from search_tools.settings import SearchSettings
from search_tools.study.storage import open_storage, shown

resource = pytest.importorskip("resource", reason="this system has no limit of a file's size")
LATENTS = torch.arange(12.0).reshape(3, 4)
CONFIG = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": [1], "channel_mult": [1],
          "transformer_depth": [0], "transformer_depth_output": [0, 0], "transformer_depth_middle": -1}  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return TeacherStore(TeacherSettings(), {"model": "m"}, tmp_path, (4,))


@pytest.fixture
def full_disk():
    """Let no file grow beyond a few bytes, as a full disk does."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_the_teachers_samples_alone(store, full_disk, caplog, tmp_path):
    store.put(0, LATENTS)
    assert "cannot be stored" in caplog.text and len(caplog.records) == 1
    assert store.get(0, 3) is None and not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_of_the_system(full_disk, tmp_path):
    with pytest.raises(OSError):
        save_tensors({"a": torch.zeros(1000)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def stored(store, tmp_path):
    store.put(0, LATENTS)
    (file,) = tmp_path.glob("*.safetensors")
    assert torch.equal(store.get(0, 3), LATENTS)
    return file


def forged(file, latents):
    metadata = {"of": file.stem, "sha256": _checksum(latents)}
    save_file({"latents": latents}, file, metadata)


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (LATENTS * float("nan"), "not finite"), (LATENTS[:2].clone(), "shape (2, 4)"), (LATENTS.int(), "torch.int32"),
        (LATENTS * float("inf"), "not finite"), (LATENTS[:, :3].clone(), "(3, 4) are expected"),
        (LATENTS[:, :1].clone(), "shape (3, 1)"), (torch.zeros(3, 0), "shape (3, 0)"), (LATENTS[:, None], "shape (3, 1, 4)"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_the_teachers_are_dropped_with_one_line(store, tmp_path, caplog, latents, words):
    forged(stored(store, tmp_path), latents)
    assert store.get(0, 2) is None
    assert words in caplog.text and len(caplog.records) == 1


def test_a_forged_teacher_of_another_shape_is_computed_again(tmp_path, caplog):
    drawn = EmbeddedBackend(TeacherSettings(steps=2), tmp_path).teacher(0, 2)
    (file,) = tmp_path.glob("*.safetensors")
    forged(file, torch.zeros(2, 3, 1, 1))
    assert torch.equal(EmbeddedBackend(TeacherSettings(steps=2), tmp_path).teacher(0, 2), drawn)
    assert len(caplog.records) == 1 and "(2, 3, 32, 32) are expected" in caplog.text


@pytest.mark.parametrize("change", ["renamed", "cut", "empty", "other tensor", "no metadata", "folder", "text"])
def test_wrong_copies_are_dropped_with_one_line(store, tmp_path, caplog, change):
    file = stored(store, tmp_path)
    if change == "renamed":
        other = TeacherStore(TeacherSettings(), {"model": "other"}, tmp_path)
        other.put(0, LATENTS + 1)
        (theirs,) = set(tmp_path.glob("*.safetensors")) - {file}
        theirs.replace(file)
    elif change == "other tensor":
        save_file({"x": LATENTS}, file)
    elif change == "no metadata":
        save_file({"latents": LATENTS}, file)
    elif change == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"cut": file.read_bytes()[:-7], "empty": b"", "text": b"not a tensor\x1b[2J" * 9}[change])
    assert store.get(0, 2) is None
    assert len(caplog.records) == 1 and "they are made again" in caplog.text and "\x1b" not in caplog.text


def test_names_that_are_no_counts_are_passed_over(store, tmp_path, caplog):
    file = stored(store, tmp_path)
    for end in ("x", "-1", "1e9", "9" * 50):
        file.with_name(f"{file.stem[:-1]}{end}.safetensors").write_bytes(b"")
    assert torch.equal(store.get(0, 3), LATENTS)


# --unet


@pytest.mark.parametrize(
    "change",
    [
        {"model_channels": -32}, {"model_channels": 2**40}, {"model_channels": True}, {"model_channels": 1e300},
        {"num_res_blocks": [10_000_000]}, {"num_res_blocks": 10_000_000}, {"num_res_blocks": [True]},
        {"num_res_blocks": 32, "channel_mult": [1] * 16, "attention_resolutions": [1], "transformer_depth": 64},
        {"channel_mult": [1] * 1_000}, {"channel_mult": [2**60]}, {"in_channels": 0, "out_channels": 0}, {"context_dim": -5},
        {"context_dim": 2**50}, {"transformer_depth": [10**9]}, {"transformer_depth_middle": 10**9}, {"num_heads": True},
        {"attention_resolutions": [1], "num_res_blocks": [10**8], "transformer_depth": 1},
    ],
)  # fmt: skip
def test_an_absurd_configuration_is_refused_before_anything_is_made_of_it(change):
    with pytest.raises(FlexiError, match="unet_config has"):
        unet_arguments(CONFIG | change)


def test_no_tensor_is_read_of_a_unet_file_that_is_refused_for_its_header(tmp_path):
    size = 7 * 2**30  # of a file with a hole in it, which takes no room on most disks
    said = {"unet_config": json.dumps(CONFIG), "prediction": "eps", "beta_schedule": "linear 0.001 0.012"}
    header = {"__metadata__": said, "a": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with open(tmp_path / "u.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FlexiError, match="it has a, which its unet_config does not"):
        FileModel.load(tmp_path / "u.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


# One line


URLS = ("postgresql://me:sec ret@host:port/db", "postgresql://me:secret@[::1/db", "post gres://me:secret@h", "me:secret@h")


@pytest.mark.parametrize("url", URLS)
def test_a_password_in_a_url_that_cannot_be_understood_is_not_printed(url):
    assert "sec" not in shown(url)
    with pytest.raises(FlexiError) as caught:
        open_storage(url)
    assert "ret@" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [[], 1, {"backend": 1}, {"teacher": {"steps": "x"}}, {"stages": [], "speedup": 2}, {"speedup": "fast"},
     {"families": [["a"]]}, {"seed": None}, {"stages": 5}],
)  # fmt: skip
def test_settings_that_something_else_wrote_are_one_error(values):
    whole = {"backend": {"kind": "embedded"}, "teacher": vars(TeacherSettings()), "identity": {}, "speedup": 2.0}
    base = SearchSettings(**whole).as_dict()
    with pytest.raises(FlexiError):
        SearchSettings.from_dict(base | values if isinstance(values, dict) else values)
    assert SearchSettings.from_dict(json.loads(json.dumps(base))).as_dict() == base


@pytest.mark.parametrize("meta", [1, "x", [], {"title": 5}, {"title": ["a"]}, {"title": "t" * 10_000}])
def test_titles_of_any_type_are_borne(meta):
    node = {"class_type": "KSampler", "inputs": {}, "_meta": meta}
    with pytest.raises(FlexiError, match="2 sampling nodes") as caught:
        workflow.find_sampler(workflow.checked({"1": node, "2": node}))
    assert len(str(caught.value)) < 600
    with pytest.raises(FlexiError, match="no class_type and inputs"):
        workflow.checked({"1": node, "2": {"_meta": meta}})


def test_links_of_any_number_are_borne():
    for number in (float("nan"), float("inf"), 1e300, -1, 0.5):
        workflow.checked({"1": {"class_type": "A", "inputs": {"x": ["1", number]}}})


def test_what_a_file_says_cannot_speak_to_the_terminal(tmp_path):
    hostile = "\x1b]0;owned\x07\x1b[2J"
    file = tmp_path / "s.json"
    data = {
        "format": "flexiffusion-schedule",
        "version": 1,
        "schedule": "FX",
        "teacher": {"sampler": hostile, hostile: "[red]x"},
    }
    file.write_text(json.dumps(data))
    result = CliRunner().invoke(app, ["show", str(file)])
    assert result.exit_code == 0 and "\x1b" not in result.output and "\x07" not in result.output
    assert "\\x1b" in result.output


def test_a_failing_disk_is_one_line(capsys):
    @console.one_line_errors
    def command():
        raise OSError(28, "No space left on device")

    with pytest.raises(Exception) as caught:
        command()
    assert getattr(caught.value, "exit_code", None) == 2


def test_a_storage_that_fails_anywhere_in_a_command_is_one_line(capsys):
    from optuna.exceptions import StorageInternalError

    def failing():
        try:
            raise ValueError("database disk image is malformed\nand more")
        except ValueError as error:
            raise StorageInternalError("An exception is raised during the commit.") from error

    with pytest.raises(typer.Exit) as left:
        console.one_line_errors(failing)()
    assert left.value.exit_code == 2
    said = capsys.readouterr().err
    assert said.startswith("flexi: the study storage failed: database disk image is malformed. ")
    assert len(said.splitlines()) == 1


def test_any_other_error_of_a_command_stays_what_it_is():
    def failing():
        raise ZeroDivisionError("a fault of ours")

    with pytest.raises(ZeroDivisionError):
        console.one_line_errors(failing)()


def test_a_tensor_survives_being_written(tmp_path):
    save_tensors({"a": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(6.0).reshape(2, 3).T)
