"""Access: who may subscribe and publish, what the others are told, and that tokens stay secret."""

import base64
import hashlib
import hmac
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from pushsvc.auth import EVERYTHING as EVERY_RIGHT
from pushsvc.auth import Access
from pushsvc.bind import check_bind
from pushsvc.errors import SettingsError, Unauthorized
from pushsvc.settings import Settings
from tests.support.client import Response, Stream, publish, request
from tests.support.server import ROOT, Server, free_port
from tests.support.wait import eventually

TIMEOUT = 20  # for what takes milliseconds on an idle machine
SECRET = "a secret of more than thirty-two bytes"
LONG_SECRET = SECRET * 2  # as HS512 wants it
ORIGIN, OTHER_ORIGIN = "https://app.example", "https://evil.example"
OWN_ADDRESS = "127.0.0.2"  # of this machine, but not the one that is bound by default
JSON = {"Content-Type": "application/json"}
EVERYTHING = {"subscribe": ["*"], "publish": ["*"]}

PRIVATE = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
OTHERS = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
PUBLIC = {
    name: key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    for name, key in PRIVATE.items()
}


def token(key: Any = SECRET, algorithm: str = "HS256", *, expires: float = 600, without: str = "", **claims: Any) -> str:
    """A token that allows everything for ten minutes, but for what is asked."""
    all_claims = {"sub": "ann", "exp": int(time.time() + expires), "pushsvc": EVERYTHING, **claims}
    return jwt.encode({name: value for name, value in all_claims.items() if name != without}, key, algorithm)


def may(subscribe: list[str] | None = None, publish: list[str] | None = None, **claims: Any) -> str:
    return token(pushsvc={"subscribe": subscribe or [], "publish": publish or []}, **claims)


def encoded(part: Any) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(header: Any, key: bytes, **claims: Any) -> str:
    """A token as nobody would sign it: HMAC-SHA256 with any key at all."""
    body = {"sub": "eve", "exp": int(time.time() + 600), "pushsvc": EVERYTHING, **claims}
    signed = f"{encoded(header)}.{encoded(body)}"
    return f"{signed}.{encoded(hmac.digest(key, signed.encode(), hashlib.sha256))}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a secret, with origins, and as talkative as it can be."""
    env = {
        "PUSHSVC_JWT_KEY": SECRET,
        "PUSHSVC_CORS_ORIGINS": f"{ORIGIN}, http://localhost:3000",
        "PUSHSVC_LOG_LEVEL": "debug",
        "PUSHSVC_HEARTBEAT_SECONDS": "1",
    }
    args = ["--access-logfile", "-", "--log-level", "debug"]
    with open_to_all(tmp_path_factory.mktemp("access"), env, args) as server:
        yield server


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without a key, which has been asked for."""
    with open_to_all(tmp_path_factory.mktemp("unguarded"), {"PUSHSVC_AUTH": "none"}) as server:
        yield server


def open_to_all(directory: Path, env: dict[str, str], args: Sequence[str] = ()) -> Server:
    """A server on all addresses of this machine."""
    port = free_port()
    return Server(directory, workers=1, port=port, env=env | {"PUSHSVC_BIND": f"0.0.0.0:{port}"}, args=args)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A server for each kind of public key."""
    servers = {
        name: Server(tmp_path_factory.mktemp(name), workers=1, env={"PUSHSVC_JWT_KEY": pem})
        for name, pem in PUBLIC.items()
    }
    try:
        for server in servers.values():
            server.start()
        for server in servers.values():
            server.wait_ready()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture
def url(server: Server) -> str:
    return server.url


@pytest.fixture
def topic() -> str:
    """A topic of the test's own."""
    return f"t-{uuid.uuid4().hex}"


def ask(url: str, headers: Mapping[str, str] | None = None, query: str = "", topics: str = "topic=t") -> Response:
    """Asks for a stream by HEAD, which is answered as GET is but ends."""
    return request("HEAD", f"{url}/events?{topics}{query}", headers=headers, timeout=TIMEOUT)


def tell(url: str, headers: Mapping[str, str] | None = None, query: str = "", **fields: Any) -> Response:
    body = json.dumps({"topic": "t", "data": "x"} | fields)
    return request("POST", f"{url}/publish{query}", body, {**JSON, **(headers or {})}, timeout=TIMEOUT)


def raw(server: Server, text: str) -> bytes:
    """What a request that is sent as it is gets back."""
    with socket.create_connection((server.host, server.port), TIMEOUT) as connection:
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(65_536):
            answer += data
        return answer


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def assert_refused(answer: Response, status: int, error: str | None) -> None:
    """A problem with the challenge of RFC 6750, section 3."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), answer
    challenge = answer.headers["www-authenticate"]
    assert challenge.startswith("Bearer")
    assert re.findall(r'\berror="([^"]*)"', challenge) == ([] if error is None else [error])
    if answer.body:
        problem = answer.json()
        assert (problem["status"], bool(problem["title"]), bool(problem["detail"])) == (status, True, True)


# --- Where the token is ----------------------------------------------------------------------------------

PLACES = {
    "in the header": ({"Authorization": "Bearer {}"}, ""),
    "in the header in lower case": ({"Authorization": "bearer {}"}, ""),
    "in the query": ({}, "access_token={}"),
    "in the cookie": ({"Cookie": "pushsvc_token={}"}, ""),
    "in the cookie among others": ({"Cookie": "a=b; pushsvc_token={}; c=d"}, ""),
}


@pytest.mark.parametrize(("headers", "query"), PLACES.values(), ids=PLACES)
def test_token_is_taken(url: str, topic: str, headers: dict[str, str], query: str) -> None:
    good = may([topic], [topic])
    headers = {name: value.format(good) for name, value in headers.items()}
    query = query.format(good)
    with Stream(url, [], path=f"/events?topic={topic}&{query}", headers=headers) as stream:
        assert stream.status == 200
        stream.opened(TIMEOUT)
        answer = tell(url, headers, f"?{query}", topic=topic)
        assert answer.status == 200
        assert stream.next(TIMEOUT).last_event_id == answer.json()["id"]


PRECEDENCE = {
    "the header before the query": ("{good}", "{bad}", None, 200),
    "the header before the cookie": ("{good}", None, "{bad}", 200),
    "the query before the cookie": (None, "{good}", "{bad}", 200),
    "a bad header before a good query": ("{bad}", "{good}", None, 401),
    "a bad header before a good cookie": ("{bad}", None, "{good}", 401),
    "a bad query before a good cookie": (None, "{bad}", "{good}", 401),
}


@pytest.mark.parametrize(("header", "query", "cookie", "status"), PRECEDENCE.values(), ids=PRECEDENCE)
def test_one_token_decides(url: str, header: str | None, query: str | None, cookie: str | None, status: int) -> None:
    tokens = {"good": token(), "bad": token(expires=-600)}
    headers = bearer(header.format(**tokens)) if header else {}
    headers |= {"Cookie": f"pushsvc_token={cookie.format(**tokens)}"} if cookie else {}
    asked = f"access_token={query.format(**tokens)}" if query else ""
    assert ask(url, headers, f"&{asked}").status == status
    assert tell(url, headers, f"?{asked}").status == status


# --- 401 -------------------------------------------------------------------------------------------------

NO_TOKEN = {
    "nothing": {},
    "another scheme": {"Authorization": "Basic YW5uOmFubg=="},
    "an empty bearer": {"Authorization": "Bearer"},
    "an empty cookie": {"Cookie": "pushsvc_token="},
    "another cookie": {"Cookie": "token=x"},
}


@pytest.mark.parametrize("headers", NO_TOKEN.values(), ids=NO_TOKEN)
def test_request_without_a_token_is_401_without_an_error_code(url: str, headers: dict[str, str]) -> None:
    assert_refused(ask(url, headers), 401, None)
    assert_refused(tell(url, headers), 401, None)


BAD_TOKENS = {
    "expired": lambda: token(expires=-1),
    "long expired": lambda: token(exp=1),
    "not yet valid": lambda: token(nbf=int(time.time() + 600)),
    "of another secret": lambda: token(SECRET.upper()),
    "of another algorithm": lambda: token(LONG_SECRET, "HS512"),
    "without exp": lambda: token(without="exp"),
    "without sub": lambda: token(without="sub"),
    "exp is no number": lambda: token(exp="soon"),
    "sub is no string": lambda: forged({"alg": "HS256"}, SECRET.encode(), sub=7),
    "rights are no object": lambda: token(pushsvc=["*"]),
    "topics are no list": lambda: token(pushsvc={"subscribe": "*", "publish": "*"}),
    "topics are no strings": lambda: token(pushsvc={"subscribe": [1], "publish": [None]}),
    "alg none": lambda: jwt.encode({"sub": "eve", "exp": 9999999999, "pushsvc": EVERYTHING}, None, "none"),
    "alg none in capitals": lambda: forged({"alg": "NONE"}, b""),
    "no alg": lambda: forged({"typ": "JWT"}, SECRET.encode()),
    "alg is no string": lambda: forged({"alg": ["HS256"]}, SECRET.encode()),
    "an empty secret": lambda: forged({"alg": "HS256"}, b""),
    "garbage": lambda: "garbage",
    "three dots": lambda: "...",
    "one part missing": lambda: token().rpartition(".")[0],
    "no signature": lambda: token().rpartition(".")[0] + ".",
    "one letter changed": lambda: token()[:-5] + "".join("A" if c != "A" else "B" for c in token()[-5]) + token()[-4:],
    "claims exchanged": lambda: ".".join([token().split(".")[0], encoded({"sub": "eve"}), token().split(".")[2]]),
    "a header that is no JSON": lambda: f"{encoded(b'x')}.{encoded({})}.x",
    "a header that is a list": lambda: f"{encoded([])}.{encoded({})}.x",
    "a header that is deep": lambda: f"{encoded(b'[' * 2200)}.e30.x",
    "a header that asks for more": lambda: forged({"alg": "HS256", "crit": ["x\r\nX-Evil: 1"]}, SECRET.encode()),
    "a header with a quote": lambda: forged({"alg": "HS256", "crit": ['é"\\x']}, SECRET.encode()),
    "a key id that is no string": lambda: forged({"alg": "HS256", "kid": 1}, SECRET.encode()),
    "exp is beyond all numbers": lambda: token(exp=10**400),
    "sub has no bytes": lambda: token(sub="\ud800"),
    "deep claims": lambda: forged({"alg": "HS256"}, b"x", sub="[" * 2000),
    "bytes beyond ASCII": lambda: "\xff\xfe.\xe9.x",
}


@pytest.mark.parametrize("make", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_bad_token_is_401_invalid_token(url: str, make: Any) -> None:
    bad = make()
    for answer in (ask(url, bearer(bad)), tell(url, bearer(bad))):
        assert_refused(answer, 401, "invalid_token")
        assert "x-evil" not in answer.headers
    assert bad not in tell(url, bearer(bad)).text or len(bad) < 10


def test_stream_that_is_refused_is_no_event_stream(url: str) -> None:
    with Stream(url, "t") as stream:
        assert stream.status == 401
        assert stream.headers["content-type"] == "application/problem+json"


# --- 403, and what topics a token reaches ----------------------------------------------------------------

REACH = {
    "exact": (["room-1"], "room-1", True),
    "one of several": (["room-1", "room-2"], "room-2", True),
    "no part of the name": (["room-1"], "room-12", False),
    "no longer than the name": (["room-12"], "room-1", False),
    "capitals count": (["room-1"], "Room-1", False),
    "prefix": (["user-7:*"], "user-7:typing", True),
    "the prefix itself": (["user-7:*"], "user-7:", True),
    "less than the prefix": (["user-7:*"], "user-7", False),
    "another prefix": (["user-7:*"], "user-77:x", False),
    "everything": (["*"], "anything", True),
    "a star inside is a letter": (["a*b"], "axb", False),
    "a star inside is exact": (["a*b"], "a*b", True),
    "a question mark is a letter": (["room-?"], "room-1", False),
    "a dot is a letter": (["room.1"], "room-1", False),
    "a topic named star needs a grant for it": (["room-*"], "*", False),
    "nothing": ([], "room-1", False),
    "an empty pattern": ([""], "room-1", False),
}


@pytest.mark.parametrize(("patterns", "name", "allowed"), REACH.values(), ids=REACH)
def test_token_reaches_its_topics_and_no_others(url: str, patterns: list[str], name: str, allowed: bool) -> None:
    subscriber, publisher = bearer(may(subscribe=patterns)), bearer(may(publish=patterns))
    asked = urlencode({"topic": name})
    if allowed:
        assert ask(url, subscriber, topics=asked).status == 200
        assert tell(url, publisher, topic=name).status == 200
    else:
        assert_refused(ask(url, subscriber, topics=asked), 403, "insufficient_scope")
        assert_refused(tell(url, publisher, topic=name), 403, "insufficient_scope")


def test_one_topic_that_is_not_granted_refuses_the_whole_request(url: str, topic: str) -> None:
    limited = bearer(may([topic], [topic]))
    assert_refused(ask(url, limited, topics=f"topic={topic}&topic=other"), 403, "insufficient_scope")
    refused = request(
        "POST", f"{url}/publish", json.dumps({"topics": [topic, "other"], "data": "x"}), {**JSON, **limited}
    )
    assert_refused(refused, 403, "insufficient_scope")
    assert "'other'" in refused.json()["detail"]
    lines = "".join(json.dumps({"topic": name, "data": "x"}) + "\n" for name in (topic, "other", topic))
    batch = request("POST", f"{url}/publish", lines, {"Content-Type": "application/x-ndjson", **limited})
    assert_refused(batch, 403, "insufficient_scope")
    with Stream(url, topic, token=token(), last_event_id="earliest") as stream:
        id = publish(url, topic=topic, data="the only one", headers=bearer(token()))
        assert stream.next(TIMEOUT).last_event_id == id


def test_refusal_reaches_a_client_that_sends_a_large_body(url: str) -> None:
    body = b"x" * (8 << 20)
    assert_refused(request("POST", f"{url}/publish", body, JSON), 401, None)
    assert request("POST", f"{url}/publish", body, {**JSON, **bearer(token()), "Origin": OTHER_ORIGIN}).status == 403
    assert request("POST", f"{url}/publish", body, {**bearer(token()), "Content-Type": "text/plain"}).status == 415


def test_right_to_subscribe_is_no_right_to_publish_and_the_reverse(url: str) -> None:
    assert_refused(tell(url, bearer(may(subscribe=["*"]))), 403, "insufficient_scope")
    assert_refused(ask(url, bearer(may(publish=["*"]))), 403, "insufficient_scope")


def test_token_without_rights_may_nothing(url: str) -> None:
    for harmless in (token(without="pushsvc"), token(pushsvc={})):
        assert_refused(tell(url, bearer(harmless)), 403, "insufficient_scope")
        assert_refused(ask(url, bearer(harmless)), 403, "insufficient_scope")


def test_bad_request_without_a_token_is_401_and_tells_nothing_of_the_topic(url: str) -> None:
    assert_refused(tell(url, topic=""), 401, None)


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics"])
def test_health_metrics_and_console_need_no_token(url: str, path: str) -> None:
    assert request("GET", url + path).status == 200


# --- Public keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_public_key_takes_the_tokens_of_its_private_key_only(keyed: dict[str, Server], algorithm: str) -> None:
    url = keyed[algorithm].url
    good = bearer(token(PRIVATE[algorithm], algorithm))
    assert (ask(url, good).status, tell(url, good).status) == (200, 200)
    assert_refused(tell(url), 401, None)
    bad = {
        "another key": token(OTHERS[algorithm], algorithm),
        "expired": token(PRIVATE[algorithm], algorithm, expires=-1),
        "alg none": jwt.encode({"sub": "eve", "exp": 9999999999, "pushsvc": EVERYTHING}, None, "none"),
        "HS256 with the public key as its secret": forged({"alg": "HS256"}, PUBLIC[algorithm].encode()),
        "HS256 with the public key's DER": forged(
            {"alg": "HS256"},
            PRIVATE[algorithm].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        ),
        "its own key in the header": forged({"alg": "HS256", "jwk": {"kty": "oct", "k": "eA"}}, b"x"),
    }
    bad |= {f"{other} of its own key": token(PRIVATE[other], other) for other in PRIVATE if other != algorithm}
    for name, each in bad.items():
        answer = tell(url, bearer(each))
        assert answer.status == 401, name
        assert_refused(answer, 401, "invalid_token")


def test_fitting_algorithm_that_was_not_asked_for_is_refused(keyed: dict[str, Server]) -> None:
    assert_refused(tell(keyed["RS256"].url, bearer(token(PRIVATE["RS256"], "PS256"))), 401, "invalid_token")


# --- The end of a token ----------------------------------------------------------------------------------


def test_streams_end_cleanly_when_their_token_does_and_others_go_on(url: str, topic: str) -> None:
    expires = int(time.time()) + 2
    ends = token(exp=expires)
    with (
        Stream(url, topic, token=token()) as stays,
        Stream(url, topic, token=ends) as busy,
        Stream(url, f"{topic}-silent", token=ends) as silent,
    ):
        busy.opened(TIMEOUT)
        while time.time() < expires - 0.1:
            id = publish(url, topic=topic, data="x", headers=bearer(token()))
            assert busy.next(TIMEOUT).last_event_id == stays.next(TIMEOUT).last_event_id == id
        for stream in (busy, silent):
            assert stream.rest(TIMEOUT) == []
            assert expires <= time.time() < expires + 5  # about one second, on a machine that is not held up
            assert stream.clean_end
            assert not stream.reader.has_incomplete()
            assert " expired" in stream.reader.comments
            assert stream.reader.reconnection_time is not None
        last = publish(url, topic=topic, data="x", headers=bearer(token()))
        assert stays.next(TIMEOUT).last_event_id == last
    assert_refused(ask(url, bearer(ends) | {"Last-Event-ID": busy.last_event_id}), 401, "invalid_token")
    with Stream(url, topic, token=token(), last_event_id=busy.last_event_id) as renewed:
        assert renewed.next(TIMEOUT).last_event_id == last


# --- Idempotency keys ------------------------------------------------------------------------------------


def test_key_of_one_user_does_not_answer_another(url: str, topic: str) -> None:
    key = {"Idempotency-Key": topic}
    ids = {}
    for user in ("ann", "bob", "ann\n", ""):
        first, again = (tell(url, bearer(token(sub=user)) | key, topic=topic).json()["id"] for _ in range(2))
        assert first == again
        ids[user] = first
    assert len(set(ids.values())) == 4


def test_key_does_not_help_a_token_that_may_not_publish(url: str, topic: str) -> None:
    key = {"Idempotency-Key": topic}
    assert tell(url, bearer(token(sub="ann")) | key, topic=topic).status == 200
    assert tell(url, bearer(may(publish=["other"], sub="ann")) | key, topic=topic).status == 403


# --- Other origins ---------------------------------------------------------------------------------------


def problem_answers(url: str, headers: dict[str, str]) -> dict[str, Response]:
    return {
        "no token": tell(url, headers),
        "bad token": tell(url, headers | bearer("x")),
        "not enough": tell(url, headers | bearer(may())),
        "bad request": tell(url, headers | bearer(token()), topic=""),
        "bad stream": request("GET", f"{url}/events", headers=headers),
        "nothing there": request("GET", f"{url}/nothing", headers=headers),
        "wrong method": request("PUT", f"{url}/publish", headers=headers),
        "too large": request("POST", f"{url}/publish", b"x" * ((1 << 20) + 1), headers | bearer(token()) | JSON),
    }


@pytest.mark.parametrize("origin", [ORIGIN, "http://localhost:3000"])
def test_listed_origin_may_read_answers_streams_and_problems(url: str, topic: str, origin: str) -> None:
    headers = {"Origin": origin}
    with Stream(url, topic, headers=headers, token=token()) as stream:
        answers = {"stream": stream.headers, "publish": tell(url, headers | bearer(token())).headers}
    answers |= {name: answer.headers for name, answer in problem_answers(url, headers).items()}
    for name, got in answers.items():
        assert got.get("access-control-allow-origin") == origin, name
        assert got.get("access-control-allow-credentials") == "true", name
        assert "origin" in got.get("vary", "").lower(), name


FOREIGN = [OTHER_ORIGIN, f"{ORIGIN}.evil.example", "http://app.example", f"{ORIGIN}:444", "null"]


@pytest.mark.parametrize("origin", FOREIGN)
def test_other_origin_may_read_nothing(url: str, topic: str, origin: str) -> None:
    headers = {"Origin": origin}
    with Stream(url, topic, headers=headers, token=token()) as stream:
        answers = {"stream": stream.headers}
    answers |= {name: answer.headers for name, answer in problem_answers(url, headers).items()}
    for name, got in answers.items():
        assert "access-control-allow-origin" not in got, name
        assert "access-control-allow-credentials" not in got, name
        assert "origin" in got.get("vary", "").lower(), name


def test_answer_to_no_origin_varies_by_it_too(url: str) -> None:
    got = request("GET", f"{url}/healthz").headers
    assert "access-control-allow-origin" not in got
    assert "origin" in got["vary"].lower()


PREFLIGHTS = {"publish": ("POST", "content-type,authorization,idempotency-key"), "events": ("GET", "last-event-id")}


@pytest.mark.parametrize("path", PREFLIGHTS)
def test_preflight_needs_no_token_and_allows_a_listed_origin_what_the_service_takes(url: str, path: str) -> None:
    method, names = PREFLIGHTS[path]
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": names}
    got = request("OPTIONS", f"{url}/{path}", headers={"Origin": ORIGIN} | asked)
    assert (got.status, got.body) == (204, b"")
    assert got.headers["access-control-allow-origin"] == ORIGIN
    assert got.headers["access-control-allow-credentials"] == "true"
    assert method in got.headers["access-control-allow-methods"].split(", ")
    allowed = {name.strip().lower() for name in got.headers["access-control-allow-headers"].split(",")}
    assert set(names.split(",")) <= allowed
    assert int(got.headers["access-control-max-age"]) > 0
    other = request("OPTIONS", f"{url}/{path}", headers={"Origin": OTHER_ORIGIN} | asked)
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", [OTHER_ORIGIN, "null", "http://localhost:3001", "http://127.0.0.1", "x", ""])
def test_page_of_another_origin_may_not_publish_even_with_a_token(url: str, topic: str, origin: str) -> None:
    cookie = {"Cookie": f"pushsvc_token={token()}", "Origin": origin}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = request("POST", f"{url}/publish", f"topic={topic}&data=forged", cookie | form)
    assert (answer.status, answer.headers["content-type"]) == (403, "application/problem+json")
    with Stream(url, topic, token=token(), last_event_id="earliest") as stream:
        id = publish(url, topic=topic, data="the only one", headers=bearer(token()))
        assert stream.next(TIMEOUT).last_event_id == id


@pytest.mark.parametrize("origin", [ORIGIN, "{url}", None])
def test_page_of_the_service_or_of_a_listed_origin_may_publish(url: str, origin: str | None) -> None:
    headers = {} if origin is None else {"Origin": origin.format(url=url)}
    assert tell(url, {"Cookie": f"pushsvc_token={token()}", **headers}).status == 200


def test_page_of_another_origin_may_not_publish_to_a_service_without_a_key(unguarded: Server) -> None:
    url = unguarded.url
    assert tell(url).status == 200
    assert tell(url, {"Origin": url}).status == 200
    refused = tell(url, {"Origin": OTHER_ORIGIN})
    assert (refused.status, refused.headers["content-type"]) == (403, "application/problem+json")
    assert "access-control-allow-origin" not in refused.headers
    assert "vary" not in tell(url).headers


# --- What the log may not tell ---------------------------------------------------------------------------


def test_log_never_contains_a_token(server: Server, topic: str) -> None:
    url = server.url
    secret = token(jti=topic)
    seen = len(server.log())
    asked = [
        lambda: tell(url, query=f"?access_token={secret}"),
        lambda: tell(url, query=f"?access%5Ftoken={secret}"),
        lambda: tell(url, query=f"?x=1&access_token={secret}"),
        lambda: tell(url, bearer(secret)),
        lambda: tell(url, {"Authorization": secret}),
        lambda: tell(url, {"Cookie": f"pushsvc_token={secret}"}),
        lambda: tell(url, {"Referer": f"{url}/?access_token={secret}", "User-Agent": f"Bearer {secret}"}),
        lambda: request("GET", f"{url}/?access_token={secret}"),
        lambda: request("GET", f"{url}/nothing/{secret}?access_token={secret}"),
        lambda: request("GET", f"{url}/events?access_token={secret}"),
        lambda: request("BREW", f"{url}/events?access_token={secret}"),
        lambda: raw(server, f"GET /events?topic=t&access_token={secret} HTTP/9.9\r\n\r\n"),
        lambda: raw(server, f"GET /events?topic=t&access_token={secret}\r\n\r\n"),
        lambda: raw(server, f"GET /events?access_token={secret} x HTTP/1.1\r\n\r\n"),
        lambda: raw(server, f"GET /events HTTP/1.1\r\nAuthorization : Bearer {secret}\r\n\r\n"),
        lambda: raw(server, f"GET /events HTTP/1.1\r\nAuthorization: Bearer {secret}\0\r\n\r\n"),
        lambda: raw(server, f"GET /events?access_token={secret} HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
        lambda: raw(server, f"POST /publish?access_token={secret} HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n"),
    ]
    for each in asked:
        each()
    with Stream(url, [], path=f"/events?topic={topic}&access_token={secret}") as stream:
        stream.opened(TIMEOUT)
    eventually(lambda: server.log().count("stream closed", seen), TIMEOUT)
    log = server.log()
    assert log.count("access_token=***", seen) >= 5, "the log shows nothing of the requests"
    for part in (secret, secret.split(".")[1], secret.split(".")[2]):
        lines = [line for line in log.splitlines() if part in line]
        assert not lines


def test_log_never_contains_the_key(server: Server) -> None:
    assert SECRET not in server.log()


def test_nothing_in_this_file_was_an_error_in_the_log(server: Server) -> None:
    assert "error in a view" not in server.log()
    assert "Traceback" not in server.log()


# --- The start -------------------------------------------------------------------------------------------


def started(tmp_path: Path, **env: str) -> tuple[int, str]:
    """Exit status and output of a service that is expected not to start."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PUSHSVC_", "GUNICORN_"))}
    settings = {"PUSHSVC_BIND": f"127.0.0.1:{free_port()}", "PUSHSVC_BROKER_URL": f"sqlite:{tmp_path / 'push.db'}"}
    finished = subprocess.run(
        [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "wsgi:app"],
        cwd=ROOT, env=inherited | {"WEB_CONCURRENCY": "2"} | settings | env, timeout=60, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return finished.returncode, finished.stdout


LOOPBACK = ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1", "localhost"]
OPEN = ["0.0.0.0", "::", "", "10.0.0.1", "::ffff:10.0.0.1", "169.254.0.1", "example.com", "localhost.example.com"]


@pytest.mark.parametrize(("host", "closed"), [*((each, True) for each in LOOPBACK), *((each, False) for each in OPEN)])
def test_only_loopback_is_closed_to_other_machines(host: str, closed: bool) -> None:
    addresses = [("127.0.0.1", 8000), (host, 8000, 0, 0)]
    if closed:
        check_bind(Settings(), addresses)
    else:
        with pytest.raises(SettingsError, match="PUSHSVC_JWT_KEY"):
            check_bind(Settings(), addresses)
    check_bind(Settings(auth="none"), addresses)
    check_bind(Settings(jwt_key=SECRET), addresses)


def test_unix_socket_counts_as_open_for_a_proxy_may_stand_before_it() -> None:
    with pytest.raises(SettingsError, match="PUSHSVC_AUTH=none"):
        check_bind(Settings(), ["/run/pushsvc.sock"])


@pytest.mark.parametrize("bind", ["0.0.0.0:{0}", "127.0.0.1:{0},[::]:{1}"])
def test_service_that_others_could_reach_does_not_start_without_a_key(tmp_path: Path, bind: str) -> None:
    status, output = started(tmp_path, PUSHSVC_BIND=bind.format(free_port(), free_port()))
    assert status not in (0, None)
    assert "PUSHSVC_JWT_KEY" in output
    assert "PUSHSVC_AUTH=none" in output
    assert "Booting worker" not in output
    assert "Traceback" not in output


def test_service_that_others_can_reach_starts_with_a_key(server: Server) -> None:
    assert f"http://127.0.0.1:{server.port}" in server.log(), "the lines to try it with should work as pasted"
    with socket.create_connection((OWN_ADDRESS, server.port), TIMEOUT):
        pass
    assert_refused(tell(f"http://{OWN_ADDRESS}:{server.port}"), 401, None)


def test_service_that_others_can_reach_starts_without_a_key_if_that_is_meant(unguarded: Server) -> None:
    assert tell(f"http://{OWN_ADDRESS}:{unguarded.port}").status == 200


def test_peer_from_elsewhere_is_not_admitted_without_a_key() -> None:
    """Should the service be reached from outside all the same."""
    assert Access(Settings()).admit(None, None, None, "127.0.0.1") == EVERY_RIGHT
    assert Access(Settings(auth="none")).admit(None, None, None, "10.0.0.1") == EVERY_RIGHT
    for peer in ("10.0.0.1", "::ffff:10.0.0.1", ""):
        with pytest.raises(Unauthorized):
            Access(Settings()).admit(None, None, None, peer)


def private_pem() -> str:
    return PRIVATE["RS256"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def pem_of(key: Any) -> str:
    return str(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


BAD_KEYS = {
    "a PEM that is none": ("-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----", "", "PUSHSVC_JWT_KEY"),
    "a private key": (private_pem(), "", "PUSHSVC_JWT_KEY"),
    "a curve that is not supported": (pem_of(ec.generate_private_key(ec.SECP256K1())), "", "PUSHSVC_JWT_KEY"),
    "a key that signs nothing": (pem_of(x25519.X25519PrivateKey.generate()), "", "PUSHSVC_JWT_KEY"),
    "none for a secret": (SECRET, "none", "PUSHSVC_JWT_ALGORITHMS"),
    "RS256 for a secret": (SECRET, "RS256", "PUSHSVC_JWT_ALGORITHMS"),
    "HS256 for a public key": (PUBLIC["RS256"], "RS256,HS256", "PUSHSVC_JWT_ALGORITHMS"),
    "another curve": (PUBLIC["ES256"], "ES384", "PUSHSVC_JWT_ALGORITHMS"),
    "an algorithm that does not exist": (PUBLIC["EdDSA"], "EdDSA,XX", "PUSHSVC_JWT_ALGORITHMS"),
}


@pytest.mark.parametrize(("key", "algorithms", "named"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_bad_key_or_algorithm_is_refused_with_its_name(key: str, algorithms: str, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Access(Settings(jwt_key=key, jwt_algorithms=algorithms))
    assert caught.value.detail.startswith(named)
    assert key not in caught.value.detail


def test_bad_key_stops_the_start_with_a_message(tmp_path: Path) -> None:
    key, algorithms, named = BAD_KEYS["a private key"]
    status, output = started(tmp_path, PUSHSVC_JWT_KEY=key, PUSHSVC_JWT_ALGORITHMS=algorithms)
    assert status not in (0, None)
    assert f"pushsvc: {named}" in output
    assert output.count("Booting worker") <= 2, "workers were started again"
    assert str(ROOT / "pushsvc") not in output, "there is a traceback"
    assert key not in output


ACCEPTED = {
    "the fitting one of a secret": (LONG_SECRET, "", LONG_SECRET, ["HS256"]),
    "several of a secret": (LONG_SECRET, "HS256, HS512", LONG_SECRET, ["HS256", "HS512"]),
    "the fitting one of RSA": (PUBLIC["RS256"], "", PRIVATE["RS256"], ["RS256"]),
    "several of RSA": (PUBLIC["RS256"], "RS256,PS256", PRIVATE["RS256"], ["RS256", "PS256"]),
    "not the fitting one": (PUBLIC["RS256"], "RS512", PRIVATE["RS256"], ["RS512"]),
}


@pytest.mark.parametrize(("key", "asked", "private", "accepted"), ACCEPTED.values(), ids=ACCEPTED)
def test_algorithms_that_were_asked_for_are_accepted_and_no_others(
    key: str, asked: str, private: Any, accepted: list[str]
) -> None:
    access = Access(Settings(jwt_key=key, jwt_algorithms=asked))
    for algorithm in ("HS256", "HS512") if private == key else ("RS256", "RS512", "PS256"):
        with pytest.raises(Unauthorized) if algorithm not in accepted else nullcontext():
            assert access.admit(f"Bearer {token(private, algorithm)}", None, None, "10.0.0.1").user == "ann"
