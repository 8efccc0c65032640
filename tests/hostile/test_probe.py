import asyncio, os
import pytest
from pathlib import Path
from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import FakeProvider, answer, chat_answer, chunk, stream
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.tenant import new_tenant
from tests.harness.eventually import eventually, moment

async def raw(port, data, t=3):
    c = await RawConnection.open(port)
    await c.send(data)
    try:
        return await asyncio.wait_for(c.reader.read(3000), t)
    except TimeoutError:
        return b"<<timeout>>"
    finally:
        c.reset()

async def test_probe(stores, workdir, database):
    prov = await FakeProvider().start()
    t = await new_tenant(database, stores.pepper)
    async with Gateway(stores, workdir, config_for(prov.base_url)) as g:
        for host in (b"[::1", b"a b", b"", b"x/v1/y?z", b"\xff"):
            print("HOST", host, await raw(g.port, b"GET /nope HTTP/1.1\r\nhost: " + host + b"\r\n\r\n"))
        for path in (b"/%ff", b"/\x80", b"/nope?x=%ff", b"/readyz?verbose=%ff", b"//v1/models", b"/%00", b"/v1/models/%ff", b"/v1/models/%ed%a0%80", b"*", b"http://evil/v1/models", b"/\xed\xa0\x80"):
            print("PATH", path, await raw(g.port, b"GET " + path + b" HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + t.key.encode() + b"\r\n\r\n"))
        for h in (b"cookie: \xff=\xfe;;;=", b"content-type: \xff", b"accept: \xff", b"accept: ;;;q=", b"content-type: application/json; charset=nope", b"content-length: 5\r\ncontent-type: application/json\r\n\r\n[[[[["):
            print("HDR", h, await raw(g.port, b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + t.key.encode() + b"\r\n" + h + b"\r\n\r\n"))
            print("HDRPOST", h, await raw(g.port, b"POST /nope HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + t.key.encode() + b"\r\n" + h + b"\r\n\r\n"))
        # usage numbers
        for n in (10**18, 10**30, -5, 1.5, 10**19):
            body = ('{"usage":{"prompt_tokens":%s,"completion_tokens":1,"total_tokens":3}}' % n).encode()
            prov.scripts.append(answer(body))
            got = await call(g.port, post("/v1/chat/completions", t.key, chat()))
            print("USAGE", n, got.status)
            got = await call(g.port, post("/v1/chat/completions", t.key, chat()))
            print("USAGE after", n, got.status, got.body[:200])
        for st in ("099", "600", "999", "302", "204", "304", "100", "101"):
            prov.scripts.append(answer(b"{}", st))
            try:
                print("STATUS", st, await asyncio.wait_for(call(g.port, post("/v1/chat/completions", (await new_tenant(database, stores.pepper)).key, chat())), 8))
            except Exception as e: print("STATUS", st, repr(e))
            prov.scripts.clear()
        await moment(0.3)
        print(g.log[-6000:])
    await prov.close()
