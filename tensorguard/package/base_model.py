"""The binding of a package to the base model its adapter was made for."""

from __future__ import annotations

from pathlib import Path

from tensorguard.errors import BaseModelMismatchError
from tensorguard.models.identity import BaseModelIdentity, base_model_identity
from tensorguard.package.manifest import BaseModelReference, Manifest


def reference(identity: BaseModelIdentity) -> BaseModelReference:
    """What a manifest says about a base model."""
    return BaseModelReference(
        name=identity.name,
        config_sha256=identity.config_sha256,
        tokenizer_sha256=identity.tokenizer_sha256,
        weight_index_sha256=identity.weight_index_sha256,
    )


def check_base_model(manifest: Manifest, identity: BaseModelIdentity) -> None:
    """Raise BaseModelMismatchError, naming what differs, unless the package was made for this model."""
    wanted = manifest.base_model
    expected = BaseModelIdentity(wanted.name, wanted.config_sha256, wanted.tokenizer_sha256, wanted.weight_index_sha256)
    if differences := expected.differences(identity):
        raise BaseModelMismatchError(
            f"package {manifest.tenant}/{manifest.package_id} was made for base model {wanted.name}; "
            f"{identity.name} has another {' and another '.join(differences)}. Serve the model it was made "
            "for, or pack the adapter for this one"
        )


def check_base_model_folder(manifest: Manifest, model: str) -> None:
    """`check_base_model` before anything is started, which is minutes earlier than the engine's own check.

    A name on the Hugging Face hub is left to the engine, which has the files then. Raises ConfigurationError too, for
    a folder that holds no model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        check_base_model(manifest, base_model_identity(folder))
