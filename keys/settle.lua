-- Settle the quota of calls that have ended: give back what each reserved and did not use, and its slot. Idempotent: a
-- reservation is taken out by the first who settles it. The buckets are those of keys/quota.lua.
--
-- KEYS[1…n] the calls' reservations    KEYS[n + 1]  the organization's buckets
-- KEYS[n + 2…] lease sets of those scopes that limit concurrency
-- ARGV[1]  n    ARGV[2], ARGV[3] …  request id and tokens used (-1: as reserved), n times
-- ARGV[2n + 2]  five limits a scope, as for keys/quota.lua    ARGV[2n + 3…]  the scopes' fields in the hash

local MINUTE, DAY, NEVER, BUCKET = 60000, 86400, -9007199254740992, '<dddddd'
local call, pack, unpack_, min = redis.call, struct.pack, struct.unpack, math.min
local n = tonumber(ARGV[1])

local ended, refunds = {}, {}
for i = 1, n do
  local record = call('GETDEL', KEYS[i])
  if record then
    ended[#ended + 1] = ARGV[2 * i]
    local used = tonumber(ARGV[2 * i + 1])
    local refund = used >= 0 and unpack_('<d', record) - used or 0
    if refund ~= 0 then refunds[#refunds + 1] = refund end
  end
end
if #ended > 0 then
  for k = n + 2, #KEYS do call('ZREM', KEYS[k], unpack(ended)) end
end

local packed, names = ARGV[2 * n + 2], 2 * n + 2
local scopes = #packed / 40
if #refunds == 0 or scopes == 0 then return {#ended} end
local had = call('HMGET', KEYS[n + 1], unpack(ARGV, names + 1))
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
if #set > 0 then call('HSET', KEYS[n + 1], unpack(set)) end
return {#ended}
