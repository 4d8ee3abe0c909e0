-- What every connection does first: take part in the present epoch, or begin the next.
-- An epoch ends with the life of the server that it began in: a server that was restarted, or that became master, may
-- have lost the newest events, and their numbers must not be given again. One whose sequence has gone back within one
-- life, as a master does that follows another for a while, has lost them too. One that has no log may have lost any
-- number of them, and the caller may be one that knows of none: so an epoch begins at the clock, which is ahead of all
-- numbers that were given before.
-- ARGV: the server's life: its run id, and where it was made a master meanwhile ':' and its replication id; the epoch and
-- the newest sequence that the caller knows of, or empty; 1 if what follows is to hold from now on, 0 if only in a log
-- that has none; what retention and idempotency ask: events, age, window, or nothing: then the log has none of its own
-- until somebody comes who has. Returns EPOCH, SEQ, the sequence that the epoch began after, which no event has, and P past.

local run, known, newest, is_new = ARGV[1], ARGV[2], tonumber(ARGV[3]) or 0, ARGV[4] == '1'
local STRIDE = 1000000 -- more events than can be lost with the end of an epoch

local state = redis.call('HMGET', LOG, 'epoch', 'seq', 'run', 'start')
local epoch, seq, start = state[1], tonumber(state[2] or 0), tonumber(state[4] or 0)
-- A master that has had no replica for long forgets that it was made one: it is the same life then.
local lives_on = state[3] == run or string.sub(state[3] or '', 1, #run + 1) == run .. ':'
if not lives_on or (known == epoch and newest > seq) then
  local began = clock()
  if epoch then
    write('HSET', P .. 'past', epoch, text(seq) .. ' ' .. text(start))
    began = math.max(began, tonumber(epoch, 16) + 1)
  end
  if known ~= '' and known ~= epoch then
    began = math.max(began, tonumber(known, 16) + 1)
  end
  seq = math.max(math.max(seq, newest) + STRIDE, began * 1000) -- in us: nobody publishes a million events a second
  epoch, start = string.format('%011x', began), seq
  write('HSET', LOG, 'epoch', epoch, 'seq', text(seq), 'run', run, 'start', text(seq))
end
-- The caller's log may be one that this server has lost: then this one follows it if its numbers do.
if known ~= '' and tonumber(known, 16) < tonumber(epoch, 16) and newest < start
    and redis.call('HEXISTS', P .. 'past', known) == 0 then
  write('HSET', P .. 'past', known, text(newest))
end
for place, name in ipairs({'events', 'age', 'window'}) do
  local set, wanted = redis.call('HGET', LOG, name), ARGV[4 + place]
  if wanted and wanted ~= set and (is_new or not set) then
    write('HSET', LOG, name, wanted)
    if name == 'age' then
      redis.call('HSET', LOG, 'due', 1) -- to be worked out anew
    elseif name == 'events' then
      redis.call('HSET', LOG, 'thin', 0)
    end
  end
end
return {epoch, text(seq), text(start), redis.call('HGETALL', P .. 'past')}
