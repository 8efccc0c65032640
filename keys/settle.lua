-- Settle the quota of calls that have ended: give back what each reserved and did not use, and its slot. Idempotent: a
-- reservation is taken out by the first who settles it. The buckets are those of keys/quota.lua.
--
-- KEYS[1…n] the calls' reservations    KEYS[n+1…n+n·b]  the calls' caps, those of the first call first
-- KEYS[n+n·b+1]  the organization's buckets    KEYS[n+n·b+2…] lease sets of those scopes that limit concurrency
-- ARGV[1]  n    ARGV[2], ARGV[3], ARGV[4] …  request id, tokens used (-1: as reserved), what it takes of each of the b
--          caps (as doubles), n times
-- ARGV[3n+2]  b    ARGV[3n+3]  five limits a scope, as for keys/quota.lua    ARGV[3n+4…]  the scopes' fields in the hash

local MINUTE, DAY, NEVER, BUCKET = 60000, 86400, -9007199254740992, '<dddddd'
local call, pack, unpack_, min, format = redis.call, struct.pack, struct.unpack, math.min, string.format
local n = tonumber(ARGV[1])
local caps = tonumber(ARGV[3 * n + 2])

local ended, refunds = {}, {}
for i = 1, n do
  local id = ARGV[3 * i - 1]
  local record = call('GETDEL', KEYS[i])
  if record then
    ended[#ended + 1] = id
    local used = tonumber(ARGV[3 * i])
    local refund = used >= 0 and unpack_('<d', record) - used or 0
    if refund ~= 0 then refunds[#refunds + 1] = refund end
  end
  for b = 1, caps do
    local key = KEYS[n + (i - 1) * caps + b]
    local known = call('HMGET', key, 's', 'r', id)
    -- What is not held was settled before, or is known to PostgreSQL: that is where the cap was read from again.
    if known[1] and known[3] then
      call('HDEL', key, id)
      call('HSET', key, 's', format('%.0f', tonumber(known[1]) + unpack_('<d', ARGV[3 * i + 1], b * 8 - 7)),
        'r', format('%.0f', tonumber(known[2]) - tonumber(known[3])))
    end
  end
end
local buckets = n + n * caps + 1
if #ended > 0 then
  for k = buckets + 1, #KEYS do call('ZREM', KEYS[k], unpack(ended)) end
end

local packed, names = ARGV[3 * n + 3], 3 * n + 3
local scopes = #packed / 40
if #refunds == 0 or scopes == 0 then return {#ended} end
local had = call('HMGET', KEYS[buckets], unpack(ARGV, names + 1))
local set = {}
for s = 1, scopes do
  if had[s] then
    local _, _, minute, day = unpack_('<dddd', packed, s * 40 - 39)
    local m, d, rm, rd, tm, td = unpack_(BUCKET, had[s])
    for r = 1, #refunds do
      if minute >= 0 and tm > NEVER then tm = min(minute * MINUTE, tm + refunds[r] * MINUTE) end
      if day >= 0 and td > NEVER then td = min(day * DAY, td + refunds[r] * DAY) end
    end
    set[#set + 1] = ARGV[names + s]
    set[#set + 1] = pack(BUCKET, m, d, rm, rd, tm, td)
  end
end
if #set > 0 then call('HSET', KEYS[buckets], unpack(set)) end
return {#ended}
