"""Classify the errors of client libraries: worth a retry or not, and which of Python's own errors they become."""

import logging
import os
import re
import traceback
from dataclasses import dataclass
from typing import Literal

from owlsam_ray.errors import one_line
from owlsam_ray.storage.secrets import masked

_log = logging.getLogger(__name__)

FaultKind = Literal[
    "missing", "forbidden", "expired", "anonymous", "no_package", "bad_request", "beyond", "busy", "refused", "as_is"
]

_BUSY_STATUS = {408, 425, 429, 500, 502, 503, 504}
_BUSY_CODES = {"BadDigest", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout", "SlowDown"}
_BUSY_CODES |= {"ServiceUnavailable", "Throttling", "ThrottlingException", "XAmzContentSHA256Mismatch"}
_EXPIRED_CODES = {"ExpiredToken", "InvalidToken", "RequestTimeTooSkewed", "TokenRefreshRequired"}
_ANONYMOUS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
_ANONYMOUS |= {"NoAuthTokenError", "SSOTokenLoadError", "TokenRetrievalError", "UnauthorizedSSOTokenError"}
_BAD_REQUEST = {"InvalidURL", "NonHttpUrlClientError", "ParamValidationError", "ValueError"}
_OF_THE_URL = {"TypeError", "AttributeError", "LookupError", "NotImplementedError"}
"""Further errors that foreign libraries raise for a URL they cannot handle."""
_REFUSED = {"ClientConnectorCertificateError", "NonRetryableError", "SSLCertVerificationError"}
_BUSY_NAMES = {"ClientError", "ConnectionError", "CredentialRetrievalError", "HTTPClientError", "TransportError"}
_BUSY_NAMES |= {"HTTPError", "HttpError", "IncompleteReadError", "RefreshError", "RequestException", "TimeoutError"}
_BUSY_NAMES |= {"ResponseParserError", "ResponseStreamingError", "GoogleAPIError", "gaierror", "SSLError"}
# Truncated or wrong data, as raised by http.client, google-resumable-media, huggingface_hub and this package.
_BUSY_NAMES |= {"CutError", "DataCorruption", "IncompleteRead", "ConsistencyError", "TrickleTimeoutError"}
_BUSY_NAMES |= {"EOFError", "BadGzipFile"}
# A file is not in the cache, and the server could not be reached: a FileNotFoundError that says nothing about the file.
_BUSY_NAMES |= {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}
_IS_WRONG_CONTENT = re.compile(r"checksum|crc|md5|^JSONDecodeError$", re.IGNORECASE)
"""Error names of botocore, gcsfs, … for bytes that do not match their checksum, or an answer that is truncated or is a
proxy's page; some are also a `ValueError`."""
_MASKED_AT_MOST = 20_000
"""Maximum characters of a message that are searched for secrets; the rest is not shown anyway."""


class CutError(OSError):
    """Storage sent less than it stated, or another part of the file."""


class TrickleTimeoutError(OSError):
    """Storage sent too slowly."""


class TooLargeError(OSError):
    """The file is larger than wanted; it was not read."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The meaning of a client library's error."""

    kind: FaultKind
    what: str
    """Status, code and message in one line."""

    @property
    def is_worth_a_retry(self) -> bool:
        """Whether the same request may succeed later."""
        return self.kind == "busy"


def understand(error: BaseException, *, is_foreign: bool = False) -> Fault:
    """Classify an error raised by any client library.

    Errors are recognised by names and attributes, so that no library needs to be imported.

    Args:
        error: an error of any class.
        is_foreign: whether it comes from a file system that is not known here.
    """
    status, code, message = _http_facts(error)
    if status is not None:
        what = " ".join(f"{status} {code if code != str(status) else ''}".split())
        return Fault(
            _kind_of_status(status, code, message),
            one_line(masked(f"{what}: {message[:_MASKED_AT_MOST]}" if message else what)),
        )
    names = _names(error)
    if isinstance(error, FileNotFoundError) and not (names | _names(error.__cause__)) & _BUSY_NAMES:
        return Fault("missing", "there is no such file")
    if "TooManyRedirects" in names:
        return Fault("refused", "too many redirects")
    return Fault(_kind_of_names(names, is_foreign), described(error))


def _names(error: BaseException | None) -> set[str]:
    """Names of an error's class and its base classes."""
    return {kind.__name__ for kind in type(error).__mro__}


def _kind_of_names(names: set[str], is_foreign: bool) -> FaultKind:
    if names & _ANONYMOUS:
        return "anonymous"
    if names & _REFUSED:
        return "refused"
    if any(map(_IS_WRONG_CONTENT.search, names)):
        return "busy"
    if names & _BAD_REQUEST:
        return "bad_request"
    if names & _BUSY_NAMES:
        return "busy"
    if is_foreign and names & _OF_THE_URL:
        return "bad_request"
    if is_foreign and "ImportError" in names:
        return "no_package"
    return "as_is" if "OSError" in names else "refused"


def described(error: BaseException, limit: int = 300) -> str:
    """Class and message of an error in one line, masked and truncated, even if converting it to text fails.

    Args:
        error: an error of any class.
        limit: maximum number of characters.
    """
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 (foreign code may raise anything)
        return name
    text = f"{name}: {text}" if text else name
    # Mask before truncating: in half a URL, secrets cannot be recognised.
    return one_line(masked(text[: max(_MASKED_AT_MOST, 10 * limit)]), limit)


_warned: set[tuple[str, str]] = set()


def warn_once(where: str, error: BaseException) -> None:
    """Log an unexpected error once, with the place where it was raised, however often it occurs.

    Args:
        where: what fails. Together with the class of the error it defines a kind; this process logs only the first
            error of a kind.
        error: an error of a foreign library.
    """
    kind = where, type(error).__name__
    if kind in _warned:
        return
    _warned.add(kind)
    frames = traceback.extract_tb(error.__traceback__)
    origin = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    _log.warning("%s fails: %s%s; further errors of this kind are not logged", where, described(error), origin)


def _kind_of_status(status: int, code: str, message: str) -> FaultKind:
    if code in _EXPIRED_CODES:
        return "expired"
    if status == 401:
        return "anonymous" if "Anonymous caller" in message else "expired"
    if status in _BUSY_STATUS or code in _BUSY_CODES or (status == 403 and "rate limit" in message.lower()):
        return "busy"
    known: dict[int, FaultKind] = {403: "forbidden", 404: "missing", 410: "missing", 416: "beyond"}
    return known.get(status, "refused")


def _http_facts(error: BaseException) -> tuple[int | None, str, str]:
    """Status, error code and message of the answer behind an error; the status is None when there was no answer."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's ClientError, which s3fs chains to another error
            details = response.get("Error", {})
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(details.get("Code", "")), str(details.get("Message", ""))
        # requests and httpx, which most foreign file systems use; azure's errors carry the status themselves
        status = getattr(response if response is not None else each, "status_code", None)
        if isinstance(status, int) and status >= 400:
            return status, "", str(getattr(each, "message", None) or getattr(each, "reason", None) or "")
    name = type(error).__name__
    if name == "HttpError" and getattr(error, "code", None) is not None:  # gcsfs
        return int(getattr(error, "code", 0)), "", str(getattr(error, "message", ""))
    if getattr(error, "status", 0) and hasattr(error, "request_info"):  # aiohttp
        return int(getattr(error, "status", 0)), "", str(getattr(error, "message", ""))
    if name == "OSError" and getattr(error, "errno", None) is None and str(error).startswith("Forbidden"):  # gcsfs
        return 403, "", str(error).partition("\n")[2]
    if name == "ProxyError" and not str(error):  # gcsfs's name for it
        return 502, "", ""
    return None, "", ""
