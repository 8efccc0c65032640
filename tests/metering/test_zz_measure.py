import time, timeit
from datetime import UTC, datetime
from sqlalchemy import text
from core.clock import SystemClock
from metering.price_import import *
from metering.price_list import *
from metering.prices import *
async def test_measure(session, database, tenant):
    L = read_price_list(installed_price_list())
    t=time.perf_counter(); ch = await diff(session, L.prices); t1=time.perf_counter(); n=await import_prices(session, ch, L.digest); t2=time.perf_counter()
    ch2 = await diff(session, L.prices); t3=time.perf_counter()
    print("\ndiff empty", t1-t, "import", n, t2-t1, "diff full", t3-t2)
    await session.execute(text("INSERT INTO prices (id, model, source, terms) SELECT 'price_z'||lpad(n::text,25,'0'), 'zz'||n, 'litellm', cast(:t as jsonb) FROM generate_series(1,50000) n"), {"t": '{"tiers":{"default":[{"rates":{"input_tokens":2500000000,"cached_input_tokens":1250000000,"output_tokens":10000000000}}]}}'})
    for _ in range(3):
        t=time.perf_counter(); await session.execute(text("SELECT count(*) FROM prices")); print("count", time.perf_counter()-t)
    await session.rollback()
    async with database.transaction() as s:
        await import_prices(s, await diff(s, {k: L.prices[k] for k in list(L.prices)[:500]}), L.digest)
    book = PriceBook(SystemClock())
    names=list(L.prices)[:500]
    t=time.perf_counter(); await book.refresh(database, names); print("refresh", time.perf_counter()-t)
    t=time.perf_counter(); await book.refresh(database, names); print("refresh unchanged", time.perf_counter()-t)
    o=tenant.organization_id; ln=("openai/"+names[3], names[3])
    assert book.find(o, "m", ln)
    print("find", min(timeit.repeat(lambda: book.find(o,"m",ln), number=100000, repeat=5))/100000*1e6, "us")
    def miss():
        book._found.clear(); book.find(o,"m",ln)
    print("miss", min(timeit.repeat(miss, number=10000, repeat=5))/10000*1e6, "us")
