-- Reserve, settle or renew the quota of one call, all or nothing, on Redis's own clock. Integers only.
--
-- KEYS[1]  record of this request's reservation     KEYS[2s], KEYS[2s+1]  bucket hash and lease set of scope s
-- ARGV[1]  act: reserve | settle | renew   ARGV[2]  request id
-- ARGV[3]  reserve: tokens wanted; settle: tokens used (-1: as reserved); renew: unused
-- ARGV[4]  lease in ms   ARGV[5]  number of scopes, then five limits a scope (-1: none):
--          requests a minute, requests a day, tokens a minute, tokens a day, concurrent requests
--
-- A bucket counts in small units so that refilling is a whole number of them: a minute's in 1/60,000 (one unit a ms for a
-- limit of one a minute), a day's in 1/86,400 (one a second). Fields: m, d = time of the last refill in ms and s;
-- rm, rd, tm, td = levels. A level may be negative (debt): a call may use more than it reserved.

local MINUTE, DAY = 60000, 86400
local act, id, amount, lease_ms, scopes = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local RECORD_TTL_MS = 7200000
local BUCKET_TTL_MS = 172800000

local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(tonumber(time[2]) / 1000)

local function integer(number) return string.format('%d', number) end

if act == 'renew' then
  for s = 1, scopes do
    if tonumber(ARGV[5 + s * 5]) >= 0 then
      redis.call('ZADD', KEYS[s * 2 + 1], 'XX', integer(now_ms + lease_ms), id)
      redis.call('PEXPIRE', KEYS[s * 2 + 1], integer(lease_ms * 2))
    end
  end
  return {1}
end

if act == 'settle' then
  local record = redis.call('GETDEL', KEYS[1])
  if not record then return {0} end
  local reserved = tonumber(string.match(record, '^%-?%d+'))
  local refund = 0
  if amount >= 0 then refund = reserved - amount end
  for s = 1, scopes do
    local at = 5 + (s - 1) * 5
    local minute, day = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
    if refund ~= 0 and (minute >= 0 or day >= 0) then
      local level = redis.call('HMGET', KEYS[s * 2], 'tm', 'td')
      if minute >= 0 and level[1] then
        redis.call('HSET', KEYS[s * 2], 'tm', integer(math.min(minute * MINUTE, tonumber(level[1]) + refund * MINUTE)))
      end
      if day >= 0 and level[2] then
        redis.call('HSET', KEYS[s * 2], 'td', integer(math.min(day * DAY, tonumber(level[2]) + refund * DAY)))
      end
    end
    if tonumber(ARGV[at + 5]) >= 0 then redis.call('ZREM', KEYS[s * 2 + 1], id) end
  end
  return {1}
end

-- The same request id gets the same answer: a command may arrive twice.
local known = redis.call('GET', KEYS[1])
if known then
  local reply = {}
  for number in string.gmatch(string.match(known, '|(.*)$'), '%-?%d+') do reply[#reply + 1] = tonumber(number) end
  return reply
end

-- Pass 1: refill and check everything; write nothing.
local blocked, wait_ms, blocked_limit = 0, 0, 0
local writes = {}
-- The tightest limit of requests and of tokens, for the caller's headers: limit, remaining, ms until full.
local shown = {{-1, -1, 0}, {-1, -1, 0}}

local function refill(level, limit, unit, elapsed)
  if not level then return limit * unit end
  return math.min(limit * unit, tonumber(level) + limit * math.min(math.max(elapsed, 0), unit))
end

local function take(kind, dimension, level, limit, unit, ms_per_step, cost)
  local left = level - cost * unit
  if left < 0 then
    local wait = math.ceil(-left / limit) * ms_per_step
    if wait > wait_ms then blocked, wait_ms, blocked_limit = dimension, wait, limit end
  end
  local remaining = math.max(0, math.floor(left / unit))
  if shown[kind][1] < 0 or remaining < shown[kind][2] then
    shown[kind] = {limit, remaining, math.ceil((limit * unit - left) / limit) * ms_per_step}
  end
  return left
end

for s = 1, scopes do
  local at = 5 + (s - 1) * 5
  local rm, rd, tm, td = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
  local concurrent = tonumber(ARGV[at + 5])
  local first = (s - 1) * 5
  if rm >= 0 or rd >= 0 or tm >= 0 or td >= 0 then
    local had = redis.call('HMGET', KEYS[s * 2], 'm', 'd', 'rm', 'rd', 'tm', 'td')
    local elapsed_ms = now_ms - (tonumber(had[1]) or now_ms)
    local elapsed_s = now_s - (tonumber(had[2]) or now_s)
    -- Time is only ever moved on, never back: a clock that was set back refills nothing twice.
    local set = {'m', integer(math.max(now_ms, tonumber(had[1]) or 0)), 'd', integer(math.max(now_s, tonumber(had[2]) or 0))}
    local function spend(field, had_level, kind, dimension, limit, unit, elapsed, ms_per_step, cost)
      if limit < 0 then return end
      local level = refill(had_level, limit, unit, elapsed)
      set[#set + 1] = field
      set[#set + 1] = integer(take(kind, first + dimension, level, limit, unit, ms_per_step, cost))
    end
    spend('rm', had[3], 1, 1, rm, MINUTE, elapsed_ms, 1, 1)
    spend('rd', had[4], 1, 2, rd, DAY, elapsed_s, 1000, 1)
    spend('tm', had[5], 2, 3, tm, MINUTE, elapsed_ms, 1, amount)
    spend('td', had[6], 2, 4, td, DAY, elapsed_s, 1000, amount)
    writes[#writes + 1] = {KEYS[s * 2], set, not had[1]}
  end
  if concurrent >= 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[s * 2 + 1], '-inf', integer(now_ms))
    if redis.call('ZCARD', KEYS[s * 2 + 1]) >= concurrent and wait_ms < 1000 then
      blocked, wait_ms, blocked_limit = first + 5, 1000, concurrent
    end
  end
end

local reply = {blocked == 0 and 1 or 0, blocked, wait_ms, blocked_limit,
  shown[1][1], shown[1][2], shown[1][3], shown[2][1], shown[2][2], shown[2][3]}
if blocked ~= 0 then return reply end

-- Pass 2: write everything.
for _, write in ipairs(writes) do
  redis.call('HSET', write[1], unpack(write[2]))
  -- A bucket that nobody touched for two days is full: it need not be kept. Set once an hour at most.
  if write[3] or now_ms % 3600000 < 1000 then redis.call('PEXPIRE', write[1], integer(BUCKET_TTL_MS)) end
end
for s = 1, scopes do
  if tonumber(ARGV[5 + s * 5]) >= 0 then
    redis.call('ZADD', KEYS[s * 2 + 1], integer(now_ms + lease_ms), id)
    redis.call('PEXPIRE', KEYS[s * 2 + 1], integer(lease_ms * 2))
  end
end
local numbers = {}
for i, number in ipairs(reply) do numbers[i] = integer(number) end
redis.call('SET', KEYS[1], integer(amount) .. '|' .. table.concat(numbers, ' '), 'PX', integer(RECORD_TTL_MS))
return reply
