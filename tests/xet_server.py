"""Xet storage on loopback: what hf_xet speaks to send and fetch large files, on the same server as the Hub.

A file comes as chunks, many to a xorb, and a shard that says which chunks of which xorbs it is made of. Routes are
added to those of hub_server. Needs HF_XET_XORB_COMPRESSION_POLICY=none: chunks are read as they lie.
"""

import hashlib
import re
import struct
import time

from hub_server import REPO, TOKEN, HubHandler, Refusal, route

XET_TOKEN = "a token for the storage alone"
HASH = "[0-9a-f]{64}"
END_OF_FILES = 32 * b"\xff"
HEADER, ENTRY = 48, 48  # bytes of every record of a shard
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30


def name_of(raw: bytes) -> str:
    """A hash as xet writes it: four numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def read_shard(shard: bytes) -> dict[str, tuple[str, list[tuple[str, int, int, int]]]]:
    """file -> sha256, terms (xorb, bytes, first chunk, end of chunks)."""
    files, at = {}, HEADER
    while shard[at : at + 32] != END_OF_FILES:
        raw, flags, count = struct.unpack_from("<32sII", shard, at)
        entries = [struct.unpack_from("<32sIIII", shard, at + HEADER + ENTRY * i) for i in range(count)]
        at += HEADER + ENTRY * count * (2 if flags & HAS_VERIFICATION else 1)
        sha256 = name_of(shard[at : at + 32])
        at += ENTRY if flags & HAS_METADATA else 0
        files[name_of(raw)] = sha256, [(name_of(x), size, first, end) for x, _, size, first, end in entries]
    return files


def chunk_places(xorb: bytes) -> list[int]:
    """Where each chunk, a header of 8 bytes and its content, begins, and where the last one ends."""
    places = [0]
    while places[-1] < len(xorb) and xorb[places[-1]] == 0:  # the version; the footer has another one
        places.append(places[-1] + 8 + int.from_bytes(xorb[places[-1] + 1 : places[-1] + 4], "little"))
    return places


def cut_out(xorb: bytes, first: int, end: int) -> bytes:
    """The content of some chunks."""
    places = chunk_places(xorb)
    return b"".join(xorb[places[i] + 8 : places[i + 1]] for i in range(first, end))


def need_storage_token(hub: HubHandler) -> None:
    given = hub.headers.get("Authorization")
    if given == f"Bearer {TOKEN}":
        hub.server.strangers.append(hub.path)
    if given != f"Bearer {XET_TOKEN}":
        raise Refusal(401, "no token for the storage")


@route("GET", REPO + r"/xet-(?P<action>read|write)-token/(?P<revision>.+)")
def give_storage_token(hub: HubHandler, kind: str, name: str, action: str, revision: str):
    hub.need_owner(name) if action == "write" else hub.open_repo(kind, name)
    place, ends = f"{hub.server.url}/xet", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": XET_TOKEN, "X-Xet-Token-Expiration": str(ends)}
    hub.answer({"casUrl": place, "accessToken": XET_TOKEN, "exp": ends}, headers=headers)


@route("POST", f"/xet/v1/xorbs/default/(?P<xorb>{HASH})")
def take_xorb(hub: HubHandler, xorb: str):
    need_storage_token(hub)
    hub.server.xorbs[xorb] = hub.body
    hub.answer({"was_inserted": True})


@route("POST", "/xet/v1/shards")
def take_shard(hub: HubHandler):
    need_storage_token(hub)
    for name, (sha256, terms) in read_shard(hub.body).items():
        content = b"".join(cut_out(hub.server.xorbs[xorb], first, end) for xorb, _, first, end in terms)
        hub.server.terms[name] = terms
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refusal(400, "the content is not what its name says")
        hub.server.blobs[sha256], hub.server.xet_names[sha256] = content, name
    hub.answer({"result": 1})


@route("GET", f"/xet/v1/reconstructions/(?P<name>{HASH})")
def tell_terms(hub: HubHandler, name: str):
    need_storage_token(hub)
    terms, places = [], {}
    for xorb, size, first, end in hub.server.terms[name]:
        chunks, starts = {"start": first, "end": end}, chunk_places(hub.server.xorbs[xorb])
        where = {"range": chunks, "url": f"{hub.server.cdn}/xorbs/{xorb}"}
        where |= {"url_range": {"start": starts[first], "end": starts[end] - 1}}
        terms.append({"hash": xorb, "unpacked_length": size, "range": chunks})
        places.setdefault(xorb, []).append(where)
    hub.answer({"offset_into_first_range": 0, "terms": terms, "fetch_info": places})


@route("GET", f"/xorbs/(?P<xorb>{HASH})")
def send_chunks(hub: HubHandler, xorb: str):
    if "Authorization" in hub.headers:
        hub.server.strangers.append(hub.path)
    first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", hub.headers["Range"]).groups())
    content = hub.server.xorbs[xorb]
    hub.answer(content[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{len(content)}"})
