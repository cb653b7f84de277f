"""The data of a run without its model: the loader of a config, or of a run directory as far as it has come."""

from __future__ import annotations

from pathlib import Path

from curriculum.loader import CurriculumLoader
from pipeline.errors import ConfigError
from pipeline.reader import Store
from train import checkpoint
from train.config_file import load_config
from train.folder import config_of_run


def loader_of(
    config_or_run: Path, overrides: tuple[str, ...] = (), *, rank: int = 0, world_size: int = 1
) -> CurriculumLoader:
    """The loader of a TOML file, or of a run directory: there with every schedule its last checkpoint has been under.

    Raises ConfigError, RunError where neither is there, a rank is outside the world, or a run is given overrides.
    """
    saved = None
    if not config_or_run.exists():
        raise ConfigError(
            "no such run and no such config",
            where=config_or_run,
            remedy="give a CONFIG.toml, or the directory that a run of it writes: its run.dir",
        )
    if not config_or_run.is_dir():
        config = load_config(config_or_run, overrides)
    elif overrides:
        raise ConfigError(
            "a run is what it was: no key can be overridden",
            where=config_or_run,
            found=" ".join(overrides),
            remedy="give its CONFIG.toml instead of the run",
        )
    else:
        config = config_of_run(config_or_run)
        saved = checkpoint.load_latest(config_or_run, lambda text: None)
    loader = config.loader(Store.open(config.store), rank=rank, world_size=world_size)
    if saved:
        # The config has the last schedule asked for, perhaps after this checkpoint: what was served decides.
        loader.load_state_dict(saved[1]["loader"], change_schedule=True)
    return loader
