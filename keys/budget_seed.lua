-- Tell Redis what PostgreSQL knows of a cap, unless Redis knows already: then what it knows is newer.
--
-- KEYS[1]  the cap in one period, as keys/quota.lua has it    ARGV[1]  how long to keep it, in ms
-- ARGV[2]  what was used    ARGV[3], ARGV[4] …  request id and what is reserved of every call that runs

if redis.call('HEXISTS', KEYS[1], 's') == 1 then return {0} end
local reserved = 0
for i = 3, #ARGV, 2 do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  reserved = reserved + tonumber(ARGV[i + 1])
end
redis.call('HSET', KEYS[1], 's', ARGV[2], 'r', string.format('%.0f', reserved))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return {1}
