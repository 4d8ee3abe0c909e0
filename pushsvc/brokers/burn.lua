-- Takes a sequence that no event will have: the position of a gap. Returns EPOCH and the sequence.

local log = open_log()
if not log then
  return redis.error_reply('NOLOG there is no log here')
end
return {log.epoch, text(write('HINCRBY', LOG, 'seq', 1))}
