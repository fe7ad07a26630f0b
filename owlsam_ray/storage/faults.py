"""What the errors of client libraries mean: worth another try, or not, and which of Python's own errors they are."""

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
"""What a foreign library stumbles over in a URL, besides."""
_REFUSED = {"ClientConnectorCertificateError", "NonRetryableError", "SSLCertVerificationError"}
_BUSY_NAMES = {"ClientError", "ConnectionError", "CredentialRetrievalError", "HTTPClientError", "TransportError"}
_BUSY_NAMES |= {"HTTPError", "HttpError", "IncompleteReadError", "RefreshError", "RequestException", "TimeoutError"}
_BUSY_NAMES |= {"ResponseParserError", "ResponseStreamingError", "GoogleAPIError", "gaierror", "SSLError"}
# Less came than was promised, or something else: http.client, google-resumable-media, huggingface_hub, ours.
_BUSY_NAMES |= {"CutError", "DataCorruption", "IncompleteRead", "ConsistencyError", "TrickleTimeoutError"}
_BUSY_NAMES |= {"EOFError", "BadGzipFile"}
# There is no such file in a cache, and nobody could be asked: a FileNotFoundError that says nothing about the file.
_BUSY_NAMES |= {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}
_IS_WRONG_CONTENT = re.compile(r"checksum|crc|md5|^JSONDecodeError$", re.IGNORECASE)
"""The name of an error of botocore, gcsfs, … about bytes that do not fit their sum, or an answer that is cut or a page
of a proxy; some are a `ValueError` as well."""
_MASKED_AT_MOST = 20_000
"""Characters of a message that are looked through; the rest is not shown anyway."""


class CutError(OSError):
    """Storage sent less than it said, or another part of the file."""


class TrickleTimeoutError(OSError):
    """Storage sent too slowly."""


class TooLargeError(OSError):
    """The file is larger than wanted; it was not read."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What an error of a client library comes to."""

    kind: FaultKind
    what: str
    """Status, code and message in one line."""

    @property
    def is_worth_a_retry(self) -> bool:
        """Whether the same request may succeed in a while."""
        return self.kind == "busy"


def understand(error: BaseException, *, is_foreign: bool = False) -> Fault:
    """The kind of an error that a client library raised, whichever that was.

    By names and attributes, so that no library is imported for it.

    Args:
        error: of any class.
        is_foreign: of a file system that is not known here.
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
    """Of an error's class and those above."""
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
    """Kind and message in one line, masked and cut, whatever the class of the error does when it is asked for a text.

    Args:
        error: of any class.
        limit: most characters.
    """
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 (the class is anyone's)
        return name
    text = f"{name}: {text}" if text else name
    # Masked before it is cut: half of a URL shows no secrets to look for.
    return one_line(masked(text[: max(_MASKED_AT_MOST, 10 * limit)]), limit)


_told: set[tuple[str, str]] = set()


def tell_once(where: str, error: BaseException) -> None:
    """One line of the log for an error that nobody expected, with the place that it comes from, however often it comes.

    Args:
        where: what fails. With the class of the error it makes a kind, of which the first is logged by this process.
        error: of a foreign library.
    """
    kind = where, type(error).__name__
    if kind in _told:
        return
    _told.add(kind)
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
    """Status, error code and message of the answer behind an error; no status when there was no answer."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's ClientError; s3fs hides it behind another
            told = response.get("Error", {})
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(told.get("Code", "")), str(told.get("Message", ""))
        # requests and httpx (the libraries of most foreign file systems); azure's errors have it themselves
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
    if name == "ProxyError" and not str(error):  # gcsfs's word for it
        return 502, "", ""
    return None, "", ""
