"""From what a command line says of data and encoders to a prepared store and an encoder."""

from __future__ import annotations

from pathlib import Path

from tuner.commands.console import progress_bar, say
from tuner.commands.options import DEMO, DataChoice
from tuner.config import EncoderRef
from tuner.data.cache import cache_root
from tuner.data.prepare import PrepareOptions, prepare
from tuner.data.remote import STORES, fetch_store, upload_store
from tuner.data.store import META_FILE, Store
from tuner.demo import fetch_demo
from tuner.encoders.registry import inspect_encoder
from tuner.encoders.text_facts import inspect_text_encoder
from tuner.errors import ConfigError, Field
from tuner.places import absolute_source, is_file
from tuner.space import SearchSpace
from tuner.storage import Storage, is_uri


def find_store(choice: DataChoice) -> Path:
    """The prepared store that `--data` names, here: the demo, a store, or a manifest that is prepared now if need be.

    Raises:
        ConfigError: encoders are not named or contradict the store, or there is no manifest for an audio root.
        DataError: as `prepare`.
    """
    path = fetch_store(choice.data) if is_uri(choice.data) else Path(choice.data)
    prepared = choice.data == DEMO or is_file(path / META_FILE)
    check_audio_root(choice.audio_root, not prepared)
    if choice.data == DEMO:
        return _demo_store(choice)
    if prepared:
        _check_same_encoders(Store.open(path), choice)
        return path
    return make_store(path, choice, None, PrepareOptions(audio_root=choice.audio_root))


def place_of(store: Path, data: str, storage: Storage | None) -> str:
    """Where the lanes of a search find its store: as `--data` says, but what was prepared into this machine's own cache
    is put into the storage, if there is one.

    Raises:
        StorageError: it is away or full, or access is denied.
    """
    if is_uri(data):
        return data
    store = store.resolve()
    if storage is None or not store.is_relative_to((cache_root() / STORES).resolve()):
        return str(store)
    place = storage.at(STORES, store.name)
    upload_store(store, place)
    return place.place


def check_audio_root(audio_root: Path | None, manifest: bool) -> None:
    """Raises: ConfigError: an audio root is given, and no manifest that would be read with it."""
    if audio_root is not None and not manifest:
        raise ConfigError(
            Field("audio_root"), f" {audio_root}: is for a manifest, and ", Field("data"), " is none; omit it"
        )


def make_store(manifest: Path, choice: DataChoice, out: Path | None, options: PrepareOptions) -> Path:
    """Prepare a manifest and say what came of it.

    Raises:
        ConfigError: an encoder is not named.
        DataError: as `prepare`.
    """
    if choice.encoder is None or choice.text_encoder is None:
        raise ConfigError(
            f"{manifest}: name with ",
            Field("encoder"),
            " and ",
            Field("text_encoder"),
            " the encoders to prepare it for (hub ids or folders, for example openai/whisper-small and "
            "sentence-transformers/all-MiniLM-L6-v2)",
        )
    encoder = EncoderRef(source=choice.encoder, pad_to_30s=choice.pad_to_30s)
    with progress_bar("preparing recordings") as progress:
        result = prepare(manifest, encoder, choice.text_encoder, out, options, progress)
    outcome = "prepared before" if result.reused else f"{result.rejects} rejects"
    say(f"{result.store}: {result.clips} clips, {outcome}")
    return result.store


def encoder_of(store: Store, choice: DataChoice) -> EncoderRef:
    """The encoder of the store that `find_store` gave for `choice`, in the place that `--encoder` names.

    It may have moved since the store was made; that it is the same one has been compared.
    """
    if choice.encoder is None:
        return store.encoder
    return store.encoder.model_copy(update={"source": absolute_source(choice.encoder)})


def choose_path(encoder: EncoderRef, path: str | None, space: SearchSpace) -> EncoderRef:
    """The encoder with the path that was asked for, or else the shortest that the space needs, which is then printed.

    Raises:
        ConfigError: there is no such path.
        EncoderError: as `inspect_encoder`.
    """
    if path is not None:
        return EncoderRef.parse({**encoder.model_dump(), "path": path}, "--path")
    beyond = [placement for placement in space.placements if placement != "tower"]
    # Without a language model to run, the placement is what is wrong, and the error names it.
    if not beyond or inspect_encoder(encoder).language_model_path is None:
        return encoder
    say(f"space {space.name} adapts the language model ({', '.join(beyond)}): taking --path full_forward")
    return encoder.model_copy(update={"path": "full_forward"})


def _demo_store(choice: DataChoice) -> Path:
    demo = fetch_demo(cache_root() / DEMO)
    encoder = choice.encoder or str(demo.audio_encoder)
    text_encoder = choice.text_encoder or str(demo.text_encoder)
    filled = DataChoice(DEMO, encoder, text_encoder, choice.pad_to_30s)
    return make_store(demo.manifest, filled, None, PrepareOptions())


def _check_same_encoders(store: Store, choice: DataChoice) -> None:
    named = choice.text_encoder
    if named is not None and inspect_text_encoder(named).fingerprint != store.text_fingerprint:
        raise ConfigError(
            f"{store.folder}: prepared for the text encoder {store.text_encoder}; "
            "leave --text-encoder away or prepare the manifest for the other one"
        )
    if choice.encoder is None and not choice.pad_to_30s:
        return
    wanted = EncoderRef(source=choice.encoder or store.encoder.source, pad_to_30s=choice.pad_to_30s)
    # The fingerprint, not the folder's name: the encoder may have moved since.
    if inspect_encoder(wanted).fingerprint != store.encoder_fingerprint:
        raise ConfigError(
            f"{store.folder}: prepared for {store.encoder.source} (pad_to_30s: {store.encoder.pad_to_30s}); "
            "leave --encoder away or prepare the manifest for the other encoder"
        )
