"""Adapters that a server has beside its model: read from folders of `peft`, and anew while it serves."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from rlver_jax.config.paths import PathError, local
from rlver_jax.config.validate import ConfigError
from rlver_jax.decoding.cache import LM
from rlver_jax.models.lora import abstract_adapter, join, side_by_side, split
from rlver_jax.models.peft_files import read_adapter
from rlver_jax.parallel import rules
from rlver_jax.serving.engine import Engine


def named_folders(flags: Sequence[str], model: str) -> dict[str, str]:
    """{name in requests: folder} of flags NAME=FOLDER; `model` is the model's own name.

    Raises:
        ConfigError: a flag has another form, a name stands for two, or a folder's name is no path.
    """
    folders: dict[str, str] = {}
    for flag in flags:
        name, equals, folder = flag.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--adapter={flag}: expected NAME=FOLDER, the name that requests give and peft's folder")
        if name in folders or name == model:
            raise ConfigError(f"--adapter={flag}: {name!r} is the name of another model here; give each its own")
        try:
            folders[name] = local(folder)
        except PathError as error:
            raise ConfigError(f"--adapter={flag}: {folder}: {error}") from error
    return folders


@dataclasses.dataclass(frozen=True)
class Adapters:
    """A model that is ready to serve, and the adapters that stand beside it."""

    lm: LM
    folders: dict[str, str]  # of the adapters, by their names
    mesh: Mesh | None = None

    def beside_model(self) -> tuple[LM, list[int]]:
        """The model with all of them, and of each of their ranks the number of its adapter: what an engine takes.

        Raises:
            AdapterError: a folder holds no adapter for this model.
            ConfigError: the model has one of its own.
        """
        if not self.folders:
            return self.lm, []
        if split(self.lm.params)[1]:
            raise ConfigError(
                "--adapter: the checkpoint's policy is an adapter itself; export it, serve its base model, and name "
                "the exported folder as one more --adapter"
            )
        loaded = [read_adapter(folder, self.lm.model, self.mesh) for folder in self.folders.values()]
        lora, adapter = side_by_side(self.lm.model, loaded)
        if self.mesh is not None:
            shapes, axes = abstract_adapter(self.lm.model, lora)
            adapter = jax.device_put(adapter, rules.tree_shardings(axes, shapes, self.mesh))
        owners = [number for number, (one, _) in enumerate(loaded) for _ in range(one.rank)]
        return LM(join(self.lm.params, adapter), self.lm.model), owners

    def swap(self, engine: Engine) -> str:
        """Reads all folders again and has the engine go on with them; returns what happened, for people.

        An adapter of another shape is refused, and all stay as they were: nothing is compiled while requests wait.
        """
        try:
            lm, owners = self.beside_model()
        except (OSError, ValueError) as error:
            return f"adapters stay as they were: {error}"
        shapes = lambda params: jax.tree.map(lambda x: (x.shape, x.dtype), params)  # noqa: E731
        if owners != engine.owners or shapes(lm.params) != shapes(engine.lm.params):
            return "adapters stay as they were: ranks or targets have changed; start the server anew for these"
        engine.swap(lm)
        return f"read anew: {', '.join(self.folders) or 'no adapter'}"
