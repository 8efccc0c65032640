-- Put right what Redis holds of one cap (a budget, an allowance) in one period, by what PostgreSQL knows.
--
-- KEYS[1]  the cap, as keys/quota.lua has it
-- ARGV[1]  what was used, in PostgreSQL, before the reservations were looked at
-- ARGV[2]  by how much Redis had counted more than PostgreSQL knew afterwards: corrections have taken it away
-- ARGV[3]  a mark: white space    ARGV[4], ARGV[5], ARGV[6] …  request id, what was held for it when that was looked at,
--          and what a call that has ended or was given up has used; nothing if it is only to be marked as seen
--
-- Answers how many were taken out. What is no longer held as it was seen was settled meanwhile, or reserved anew under
-- the same id, which writes the number without any mark: it stays.

local call, format = redis.call, string.format
local known = call('HMGET', KEYS[1], 's', 'r')
if not known[1] then return 0 end
local spent, reserved, settled = tonumber(known[1]) - tonumber(ARGV[2]), tonumber(known[2]), 0
for i = 4, #ARGV, 3 do
  local id, seen, charge = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if call('HGET', KEYS[1], id) == seen then
    if charge == '' then
      call('HSET', KEYS[1], id, seen .. ARGV[3])
    else
      call('HDEL', KEYS[1], id)
      reserved = reserved - tonumber(seen)
      spent = spent + tonumber(charge)
      settled = settled + 1
    end
  end
end
spent = math.max(spent, tonumber(ARGV[1]))
call('HSET', KEYS[1], 's', format('%.0f', spent), 'r', format('%.0f', reserved))
return settled
