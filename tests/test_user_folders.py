"""core/user_folders.py: the folders that each system has for this."""

import sys
from pathlib import Path

import pytest

from gptq_webui.core import user_folders

FOLDERS = {
    "linux": (".config/gptq-webui", ".local/share/gptq-webui", ".cache/gptq-webui"),
    "darwin": (
        "Library/Application Support/gptq-webui",
        "Library/Application Support/gptq-webui",
        "Library/Caches/gptq-webui",
    ),
    "win32": ("AppData/Local/gptq-webui", "AppData/Local/gptq-webui", "AppData/Local/gptq-webui/Cache"),
}


def found():
    return user_folders.config_folder(), user_folders.data_folder(), user_folders.cache_folder()


@pytest.mark.parametrize("system", FOLDERS)
def test_each_system_has_its_own_folders(system, monkeypatch):
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", system)
    assert found() == tuple(Path.home() / folder for folder in FOLDERS[system])


def test_the_environment_names_other_folders(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "  ")
    assert found()[0] == Path("/elsewhere/gptq-webui") and found()[2] == Path.home() / ".cache/gptq-webui"


def test_they_are_those_of_platformdirs():
    platformdirs = pytest.importorskip("platformdirs")
    names = ("user_config_dir", "user_data_dir", "user_cache_dir")
    assert found() == tuple(Path(getattr(platformdirs, name)("gptq-webui", appauthor=False)) for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="the folders of Linux")
def test_folders_of_the_operating_system_are_known():
    for each in ("/proc", "/proc/1", "/sys/class", "/dev", "/etc", "/boot/efi", "/run", "/usr/../proc"):
        assert user_folders.is_system_folder(Path(each).resolve()), each
    for each in (
        "/",
        "/home/me/models",
        "/mnt/models",
        "/media/disk",
        "/run/media/me/disk",
        "/dev/shm/models",
        "/opt/models",
        "/data",
    ):
        assert not user_folders.is_system_folder(Path(each)), each
