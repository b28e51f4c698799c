"""One hierarchy of errors. Every message names the value, the cause and the mend."""

import errno


class ZPPOError(Exception):
    """Base of every error that zppo raises on purpose; the command line prints it without a traceback and exits with 2."""


def one_line(error: BaseException, most: int = 400) -> str:
    """What a library said, in one line of at most so many characters, without the full stop.

    Where a package is missing for the proxy of this machine, that is said: what the library makes of it sounds like a wrong name.
    """
    cause: BaseException | None = error
    seen: set[int] = set()  # an error that is raised again out of what it caused is its own cause
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, ImportError) and "SOCKS" in str(cause):
            error = cause
            break
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= most else f"{text[: most - 3]}...").rstrip(".")


def used_up(error: BaseException) -> str:
    """Words for an error of this machine, whose memory, threads or processes are used up; "" for any other one."""
    text = one_line(error, 200)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or "DefaultCPUAllocator" in text:
        return (
            f"this machine's memory ran out ({type(error).__name__}: {text}): end other programs, read fewer questions (data.limit), take "
            "a smaller model, or a machine with more"
        )
    if "can't start new thread" in text or isinstance(error, BlockingIOError):
        return (
            f"no thread or process can be started any more ({text}): their limit (`ulimit -u`, pids.max of a container) or the memory is "
            "used up; raise it, end other programs, or lower grading.workers and train.threads"
        )
    return ""


class SettingsError(ZPPOError, ValueError):
    """A recipe or an override is wrong."""


class DataError(ZPPOError, ValueError):
    """A data file is wrong; the message names file, row and column."""


class UnavailableError(DataError):
    """The data of a benchmark cannot be had: no network, no access, no files. It is said and skipped, never scored 0."""


class ModelError(ZPPOError, ValueError):
    """A model, tokenizer or chat template cannot be used as asked."""


class EngineError(ZPPOError, RuntimeError):
    """A sampling engine cannot start, cannot be reached, or does not hold the trainer's weights."""


class ClusterError(EngineError):
    """The server that holds a student cannot be reached, or answers with something else than what was asked for."""


class TemplateError(ZPPOError, ValueError):
    """A prompt template cannot be read or rendered."""


class TeacherError(ZPPOError, RuntimeError):
    """The teacher cannot be used at all (found at start-up; a teacher that fails later costs quality, never the run)."""


class CheckpointError(ZPPOError, RuntimeError):
    """A checkpoint or a run folder cannot be read, or does not belong to this recipe."""


class CollapseError(ZPPOError, RuntimeError):
    """A run had right answers, and has none and no gradient any more; its newest checkpoint is from before that."""


class StorageError(ZPPOError, OSError):
    """A file of the run cannot be written: the disk is full, the folder is read-only."""


class PushError(ZPPOError, RuntimeError):
    """The hub does not take a trained student; nothing of the run is lost."""


class RewardError(ZPPOError, ValueError):
    """A user's reward function is missing or returned something that is no reward."""


class MemoryLimitError(ZPPOError, RuntimeError):
    """The device's memory does not hold even the smallest part of the work."""


class LauncherError(ZPPOError, RuntimeError):
    """The processes of a run are not what was asked for, disagree, or one of them has ended."""


class EvaluationError(ZPPOError, RuntimeError):
    """An evaluation cannot start or is not finished: a server does not answer, a package is missing, rows are still open."""


class Interrupted(KeyboardInterrupt):
    """A run stopped because it was asked to; `signum` says by which signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
