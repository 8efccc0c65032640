-- Put right what Redis holds of one budget in one period, by what PostgreSQL knows.
--
-- KEYS[1]  the budget, as keys/quota.lua has it
-- ARGV[1]  nano-USD charged, in PostgreSQL, before the reservations were looked at
-- ARGV[2]  by how many nano-USD Redis had counted more than PostgreSQL knew afterwards: corrections have taken them away
-- ARGV[3], ARGV[4] …  request id and nano-USD charged of calls that have ended, or were given up
--
-- Answers how many of these were still held.

local call, format = redis.call, string.format
local known = call('HMGET', KEYS[1], 's', 'r')
if not known[1] then return 0 end
local spent, reserved, settled = tonumber(known[1]) - tonumber(ARGV[2]), tonumber(known[2]), 0
for i = 3, #ARGV, 2 do
  local held = call('HGET', KEYS[1], ARGV[i])
  if held then
    call('HDEL', KEYS[1], ARGV[i])
    reserved = reserved - tonumber(held)
    spent = spent + tonumber(ARGV[i + 1])
    settled = settled + 1
  end
end
spent = math.max(spent, tonumber(ARGV[1]))
call('HSET', KEYS[1], 's', format('%.0f', spent), 'r', format('%.0f', reserved))
return settled
