-- A sandbox that is starting may go to another host, when its first one has no room for it.

create or replace function sandboxes_change_status() returns trigger language plpgsql as $$
declare
  -- A host that has no room for what it was to start: another one may have, and the row goes there.
  moved boolean := old.status = 'starting' and new.status = 'starting' and new.host_id <> old.host_id;
begin
  if (new.status = old.status and not moved) or new.generation <> old.generation + 1 then
    raise exception 'sandbox %: generation % -> % with status % -> %',
      old.id, old.generation, new.generation, old.status, new.status
      using errcode = '23514', constraint = 'sandboxes_generation', table = 'sandboxes';
  end if;
  if not moved
     and not exists (select from sandbox_transitions where from_status = old.status and to_status = new.status) then
    raise exception 'sandbox %: % cannot become %', old.id, old.status, new.status
      using errcode = '23514', constraint = 'sandboxes_transition', table = 'sandboxes';
  end if;
  return new;
end $$;

create or replace function sandboxes_keep_identity() returns trigger language plpgsql as $$
begin
  raise exception 'sandbox %: id, team and time of creation are fixed, and so is its host once it has started', old.id
    using errcode = '23514', constraint = 'sandboxes_identity', table = 'sandboxes';
end $$;

drop trigger if exists sandboxes_identity on sandboxes;
create trigger sandboxes_identity before update on sandboxes
  for each row when (new.id <> old.id or new.team_id <> old.team_id or new.created_at <> old.created_at
                     or (old.host_id is not null and new.host_id is distinct from old.host_id
                         and (new.host_id is null or old.status <> 'starting' or new.status <> 'starting'
                              or new.generation <> old.generation + 1)))
  execute function sandboxes_keep_identity();
