-- Reserve or renew the quota of one call, all or nothing, on Redis's own clock. Whole numbers only. keys/settle.lua
-- gives it back.
--
-- KEYS[1]  this request's reservation    KEYS[2…b+1]  caps (hard budgets, allowances) in their present period, a hash each
-- KEYS[b+2]  the organization's buckets: one hash, a field per scope
-- KEYS[b+3…] lease sets of those scopes that limit concurrency, in the order of the scopes
-- ARGV[1]  act: reserve | renew    ARGV[2]  request id    ARGV[3]  reserve: tokens wanted; renew: unused
-- ARGV[4]  reserve: the most that the call can take of each of the b caps, as doubles    ARGV[5]  lease in ms
-- ARGV[6]  five limits a scope as little-endian doubles (-1: none):
--          requests a minute, requests a day, tokens a minute, tokens a day, concurrent requests
-- ARGV[7]  the limits of the b caps as doubles    ARGV[8…] the scopes' fields in the hash
--
-- Answers with {1, …} granted, {0, …} a rate limit blocks, {2, cap, spent, reserved} a cap blocks, {3, cap} nobody has
-- told yet what was spent of it. A budget is spent in nano-USD, an allowance in its own unit.
--
-- A cap's hash holds what is spent (s), what is reserved (r), and each reservation under its request id: whatever
-- happens to a gateway, it can be told which of them never came to an end. All are whole numbers below 2^53.
--
-- A bucket counts in small units so that refilling is a whole number of them: a minute's in 1/60,000 (one unit a ms for a
-- limit of one a minute), a day's in 1/86,400 (one a second). Its field holds six doubles, which carry whole numbers up
-- to 2^53 exactly: time of the last refill in ms and in s; levels of the four buckets (-2^53: never used). A level may
-- be negative (debt): a call may use more than it reserved.
-- Few calls and little garbage: this runs for every request, and Redis has one thread.

local MINUTE, DAY, NEVER = 60000, 86400, -9007199254740992
local RECORD_TTL_MS, BUCKETS_TTL_MS, LEASES_TTL_MS = 7200000, 172800000, 86400000
local BUCKET, REPLY = '<dddddd', '<ddddddddddd'
local call, pack, unpack_, floor, ceil, min, max, format =
  redis.call, struct.pack, struct.unpack, math.floor, math.ceil, math.min, math.max, string.format
local act, id, amount, costs = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local lease_ms, packed, cap_limits = tonumber(ARGV[5]), ARGV[6], ARGV[7]
local scopes, caps, NAMES = #packed / 40, #cap_limits / 8, 7
local buckets = caps + 2

-- However deep the debt: every elapsed step counts, and no product leaves the exact range.
local function refilled(level, limit, full, elapsed)
  if level == NEVER or elapsed >= ceil((full - level) / limit) then return full end
  return level + limit * elapsed
end

local time = call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + floor(tonumber(time[2]) / 1000)

if act == 'renew' then
  for k = buckets + 1, #KEYS do
    call('ZADD', KEYS[k], 'XX', now_ms + lease_ms, id)
    call('PEXPIRE', KEYS[k], LEASES_TTL_MS)
  end
  return {1}
end

-- Pass 1: refill and check everything; write nothing.
local reserved = {}
for b = 1, caps do
  local known = call('HMGET', KEYS[b + 1], 's', 'r', id)
  if not known[1] then return {3, b} end
  local spent = tonumber(known[1])
  reserved[b] = tonumber(known[2])
  -- The command may have arrived before: what is held for this very call does not stand in its way.
  if known[3] then reserved[b] = reserved[b] - tonumber(known[3]) end
  local at = b * 8 - 7
  if spent + reserved[b] + unpack_('<d', costs, at) > unpack_('<d', cap_limits, at) then
    return {2, b, spent, reserved[b]}
  end
end
local had = scopes > 0 and call('HMGET', KEYS[buckets], unpack(ARGV, NAMES + 1)) or {}
local blocked, wait_ms, blocked_limit, set = 0, 0, 0, {}
local is_expiry_due = false

-- Return the tightest limit of requests and of tokens for the caller's headers (limit, remaining, ms until full), after
-- taking *requests* and *tokens* from every bucket; note what blocks, and what would be written.
local function look(requests, tokens)
  local request_limit, request_left, request_reset = -1, -1, 0
  local token_limit, token_left, token_reset = -1, -1, 0
  for s = 1, scopes do
    local rpm, rpd, tpm, tpd = unpack_('<dddd', packed, s * 40 - 39)
    local first = (s - 1) * 5
    local m, d, rm, rd, tm, td = now_ms, now_s, NEVER, NEVER, NEVER, NEVER
    if had[s] then m, d, rm, rd, tm, td = unpack_(BUCKET, had[s]) end
    if not had[s] or floor(d / 3600) < floor(now_s / 3600) then is_expiry_due = true end
    -- Time is only ever moved on, never back: a clock that was set back refills nothing twice.
    local elapsed_ms, elapsed_s = max(now_ms - m, 0), max(now_s - d, 0)
    m, d = max(now_ms, m), max(now_s, d)
    -- A limit that was taken away starts anew when it is set again.
    if rpm < 0 then rm = NEVER end
    if rpd < 0 then rd = NEVER end
    if tpm < 0 then tm = NEVER end
    if tpd < 0 then td = NEVER end
    if rpm >= 0 then
      rm = refilled(rm, rpm, rpm * MINUTE, elapsed_ms) - requests * MINUTE
      if rm < 0 and ceil(-rm / rpm) > wait_ms then blocked, wait_ms, blocked_limit = first + 1, ceil(-rm / rpm), rpm end
      local left = max(0, floor(rm / MINUTE))
      if request_limit < 0 or left < request_left then
        request_limit, request_left, request_reset = rpm, left, ceil((rpm * MINUTE - rm) / rpm)
      end
    end
    if rpd >= 0 then
      rd = refilled(rd, rpd, rpd * DAY, elapsed_s) - requests * DAY
      if rd < 0 and ceil(-rd / rpd) * 1000 > wait_ms then
        blocked, wait_ms, blocked_limit = first + 2, ceil(-rd / rpd) * 1000, rpd
      end
      local left = max(0, floor(rd / DAY))
      if request_limit < 0 or left < request_left then
        request_limit, request_left, request_reset = rpd, left, ceil((rpd * DAY - rd) / rpd) * 1000
      end
    end
    if tpm >= 0 then
      tm = refilled(tm, tpm, tpm * MINUTE, elapsed_ms) - tokens * MINUTE
      if tm < 0 and ceil(-tm / tpm) > wait_ms then blocked, wait_ms, blocked_limit = first + 3, ceil(-tm / tpm), tpm end
      local left = max(0, floor(tm / MINUTE))
      if token_limit < 0 or left < token_left then
        token_limit, token_left, token_reset = tpm, left, ceil((tpm * MINUTE - tm) / tpm)
      end
    end
    if tpd >= 0 then
      td = refilled(td, tpd, tpd * DAY, elapsed_s) - tokens * DAY
      if td < 0 and ceil(-td / tpd) * 1000 > wait_ms then
        blocked, wait_ms, blocked_limit = first + 4, ceil(-td / tpd) * 1000, tpd
      end
      local left = max(0, floor(td / DAY))
      if token_limit < 0 or left < token_left then
        token_limit, token_left, token_reset = tpd, left, ceil((tpd * DAY - td) / tpd) * 1000
      end
    end
    set[s * 2 - 1] = ARGV[NAMES + s]
    set[s * 2] = pack(BUCKET, m, d, rm, rd, tm, td)
  end
  return request_limit, request_left, request_reset, token_limit, token_left, token_reset
end

local rl, rr, rx, tl, tr, tx = look(1, amount)
local leases, running = buckets + 1, {}
for s = 1, scopes do
  local concurrent = unpack_('<d', packed, s * 40 - 7)
  if concurrent >= 0 then
    local count = call('ZCARD', KEYS[leases])
    if count >= concurrent then
      -- Leases of crashed gateways have run out by themselves; they are swept when room is short.
      call('ZREMRANGEBYSCORE', KEYS[leases], '-inf', now_ms)
      count = call('ZCARD', KEYS[leases])
      if count >= concurrent and wait_ms < 1000 then
        blocked, wait_ms, blocked_limit = s * 5, 1000, concurrent
      end
    end
    running[leases] = count
    leases = leases + 1
  end
end
if blocked ~= 0 then
  -- A refused call takes nothing: the headers say what there is without it.
  local was, waits, limit = blocked, wait_ms, blocked_limit
  rl, rr, rx, tl, tr, tx = look(0, 0)
  blocked, wait_ms, blocked_limit = was, waits, limit
end

local reply = {blocked == 0 and 1 or 0, blocked, wait_ms, blocked_limit,
  rl, rr, rx, tl, tr, tx}

-- Held anew also when the request id is known: what was held for it may have been given up for lost meanwhile.
if blocked == 0 then
  for b = 1, caps do
    local cost = unpack_('<d', costs, b * 8 - 7)
    call('HSET', KEYS[b + 1], 'r', format('%.0f', reserved[b] + cost), id, format('%.0f', cost))
  end
end

-- The same request id gets the same answer: a command may arrive twice.
local record = blocked == 0 and call('SET', KEYS[1], pack(REPLY, amount, unpack(reply)), 'NX', 'PX', RECORD_TTL_MS)
if not record then
  local known = call('GET', KEYS[1])
  if known then return {select(2, unpack_(REPLY, known))} end
  return reply
end

-- Pass 2: write everything.
if scopes > 0 then
  call('HSET', KEYS[buckets], unpack(set))
  -- What nobody touched for two days is full, but for deep debts: those are forgiven then. Said again once an hour.
  if is_expiry_due then call('PEXPIRE', KEYS[buckets], BUCKETS_TTL_MS) end
end
for k = buckets + 1, leases - 1 do
  call('ZADD', KEYS[k], now_ms + lease_ms, id)
  -- A set that was empty is a new one; of others it is said again once an hour, as of the buckets.
  if is_expiry_due or running[k] == 0 then call('PEXPIRE', KEYS[k], LEASES_TTL_MS) end
end
return reply
