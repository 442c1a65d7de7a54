"""The exceptions fastops raises beside ValueError and TypeError."""


class NotSupportedError(NotImplementedError):
    """A right call that no allowed implementation can run; the message lists every reason."""


class FallbackWarning(UserWarning):
    """A call went to the plain-torch reference because no faster implementation takes it."""


_KINDS: dict[str, type[Exception]] = {
    "fastops.ValueError: ": ValueError,
    "fastops.TypeError: ": TypeError,
    "fastops.NotSupportedError: ": NotSupportedError,
}


def translate(error: Exception) -> Exception:
    """The typed exception behind a C++ refusal, or the error itself when it is none of ours."""
    text = str(error)
    for prefix, kind in _KINDS.items():
        at = text.find(prefix)
        if at >= 0:
            return kind(text[at + len(prefix) :].split("\n", 1)[0])
    return error
