"""What the errors of client libraries mean: worth another try, or not, and which of Python's own errors they are."""

from dataclasses import dataclass
from typing import Literal

from owlsam_ray.storage.secrets import masked

TroubleKind = Literal[
    "missing", "forbidden", "expired", "anonymous", "bad_request", "beyond", "busy", "refused", "as_is"
]

_BUSY_STATUS = {408, 425, 429, 500, 502, 503, 504}
_BUSY_CODES = {"BadDigest", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout", "SlowDown"}
_BUSY_CODES |= {"ServiceUnavailable", "Throttling", "ThrottlingException", "XAmzContentSHA256Mismatch"}
_EXPIRED_CODES = {"ExpiredToken", "InvalidToken", "RequestTimeTooSkewed", "TokenRefreshRequired"}
_ANONYMOUS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
_ANONYMOUS |= {"NoAuthTokenError", "SSOTokenLoadError", "TokenRetrievalError", "UnauthorizedSSOTokenError"}
_BAD_REQUEST = {"InvalidURL", "NonHttpUrlClientError", "ParamValidationError", "ValueError"}
_BUSY_NAMES = {"ChecksumError", "ClientError", "ConnectionError", "CredentialRetrievalError", "HTTPClientError"}
_BUSY_NAMES |= {"HTTPError", "HttpError", "IncompleteReadError", "RefreshError", "RequestException", "TimeoutError"}
_BUSY_NAMES |= {"ResponseParserError", "ResponseStreamingError", "TransportError", "GoogleAPIError"}


@dataclass(frozen=True, slots=True)
class Trouble:
    """What an error of a client library comes to."""

    kind: TroubleKind
    what: str
    """Status, code and message in one line."""

    @property
    def is_worth_a_retry(self) -> bool:
        """Whether the same request may succeed in a while."""
        return self.kind == "busy"


def understand(error: BaseException) -> Trouble:
    """The kind of an error that a client library raised, whichever that was.

    By names and attributes, so that no library is imported for it.
    """
    status, code, message = _http_facts(error)
    if status is not None:
        what = " ".join(f"{status} {code if code != str(status) else ''}".split())
        return Trouble(_kind_of_status(status, code, message), _in_one_line(f"{what}: {message}" if message else what))
    if isinstance(error, FileNotFoundError):
        return Trouble("missing", "there is no such file")
    names = {kind.__name__ for kind in type(error).__mro__}
    if "TooManyRedirects" in names:
        return Trouble("refused", "too many redirects")
    what = _in_one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    kind: TroubleKind = "as_is"
    if names & _ANONYMOUS:
        kind = "anonymous"
    elif names & {"ClientConnectorCertificateError", "NonRetryableError"}:
        kind = "refused"
    elif names & _BAD_REQUEST:
        kind = "bad_request"
    elif names & _BUSY_NAMES:
        kind = "busy"
    elif not isinstance(error, OSError):
        kind = "refused"
    return Trouble(kind, what)


def _kind_of_status(status: int, code: str, message: str) -> TroubleKind:
    if code in _EXPIRED_CODES:
        return "expired"
    if status == 401:
        return "anonymous" if "Anonymous caller" in message else "expired"
    if status in _BUSY_STATUS or code in _BUSY_CODES or (status == 403 and "rate limit" in message.lower()):
        return "busy"
    known: dict[int, TroubleKind] = {403: "forbidden", 404: "missing", 410: "missing", 416: "beyond"}
    return known.get(status, "refused")


def _http_facts(error: BaseException) -> tuple[int | None, str, str]:
    """Status, error code and message of the answer behind an error; no status when there was no answer."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's ClientError; s3fs hides it behind another
            told = response.get("Error", {})
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(told.get("Code", "")), str(told.get("Message", ""))
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


def _in_one_line(text: str) -> str:
    line = masked(" ".join(text.split()))  # before it is cut: half of a URL shows no secrets to look for
    return line if len(line) <= 300 else f"{line[:299]}…"
