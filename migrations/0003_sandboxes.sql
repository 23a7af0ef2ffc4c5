-- Templates, sandboxes and the table of allowed changes of status.

create table if not exists templates (
  id          uuid primary key default gen_random_uuid(),
  team_id     uuid not null constraint templates_team references teams,   -- the platform team's are everyone's
  name        text not null constraint templates_name_form check (name ~ '^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$'),
  type        text not null constraint templates_type check (type in ('base', 'snapshot')),
  vcpus       integer constraint templates_vcpus check (vcpus > 0),
  memory_mb   integer constraint templates_memory_mb check (memory_mb > 0),
  size_bytes  bigint not null default 0 constraint templates_size_bytes check (size_bytes >= 0),
  created_at  timestamptz not null default now(),
  deleted_at  timestamptz,
  constraint templates_base_is_platform check (type <> 'base' or team_id = '00000000-0000-0000-0000-000000000000'),
  constraint templates_snapshot_fixes_size check (type <> 'snapshot' or (vcpus is not null and memory_mb is not null))
);
create unique index if not exists templates_name_key on templates (team_id, name) where deleted_at is null;

-- Where copies of a template lie. Deleting a template ends when its last row here is gone.
create table if not exists template_hosts (
  template_id  uuid not null constraint template_hosts_template references templates on delete cascade,
  host_id      uuid not null constraint template_hosts_host references hosts on delete cascade,
  created_at   timestamptz not null default now(),
  constraint template_hosts_pkey primary key (template_id, host_id)
);
create index if not exists template_hosts_host_id on template_hosts (host_id);

create table if not exists sandboxes (
  id                   uuid primary key,
  team_id              uuid not null constraint sandboxes_team references teams,
  host_id              uuid constraint sandboxes_host references hosts,
  template             text not null,             -- its name when the sandbox was made
  template_id          uuid constraint sandboxes_template references templates,
  vcpus                integer not null constraint sandboxes_vcpus check (vcpus > 0),
  memory_mb            integer not null constraint sandboxes_memory_mb check (memory_mb > 0),
  disk_mb              integer not null constraint sandboxes_disk_mb check (disk_mb > 0),
  -- Seconds of idleness after which it is paused; 0 = never.
  timeout_sec          integer not null default 0 constraint sandboxes_timeout_sec check (timeout_sec >= 0),
  status               text not null default 'pending' constraint sandboxes_status check (status in (
                         'pending', 'starting', 'running', 'pausing', 'paused', 'resuming', 'stopping', 'stopped',
                         'missing', 'error')),
  generation           bigint not null default 1, -- grows by one with each change of status
  host_ip              inet,
  metadata             jsonb not null default '{}'
                       constraint sandboxes_metadata_object check (jsonb_typeof(metadata) = 'object'),
  reason               text,                      -- why it is in this status, for people
  created_at           timestamptz not null default clock_timestamp(),
  started_at           timestamptz,
  last_active_at       timestamptz,
  last_updated         timestamptz not null default clock_timestamp(),
  -- When someone must look after a row that has not got on; every row on its way has one, no other has.
  transition_deadline  timestamptz,
  -- True while the sandbox lives or rests on its host, else null: then sandboxes_live_host asks nothing.
  needs_host           boolean generated always as (
                         case when host_id is not null and status not in ('stopped', 'error') then true end) stored,
  constraint sandboxes_has_host check (
    host_id is not null or status in ('pending', 'stopping', 'stopped', 'error')),
  constraint sandboxes_deadline_while_on_its_way check (
    (transition_deadline is not null) = (status in ('pending', 'starting', 'pausing', 'resuming', 'stopping'))),
  constraint sandboxes_no_slot_at_rest check (
    host_ip is null or status not in ('pending', 'paused', 'stopped', 'error')),
  -- A host with sandboxes that live or rest there cannot be deleted, and a deleted one gets none.
  constraint sandboxes_live_host foreign key (host_id, needs_host) references hosts (id, alive)
) with (fillfactor = 80);
create index if not exists sandboxes_page on sandboxes (team_id, created_at desc, id desc);
create index if not exists sandboxes_live_page on sandboxes (team_id, created_at desc, id desc)
  where status not in ('stopped', 'error');
create index if not exists sandboxes_host_id on sandboxes (host_id) where status not in ('stopped', 'error');
create index if not exists sandboxes_transition_deadline on sandboxes (transition_deadline)
  where transition_deadline is not null;
create index if not exists sandboxes_template_id on sandboxes (template_id) where status not in ('stopped', 'error');

-- The one table of allowed changes of status (agent/wire/lifecycle.py has the same one). stopped and error are final: they are in no first column.
create table if not exists sandbox_transitions (
  from_status  text not null,
  to_status    text not null,
  constraint sandbox_transitions_pkey primary key (from_status, to_status)
);
insert into sandbox_transitions (from_status, to_status) values
  ('pending', 'starting'), ('pending', 'stopping'), ('pending', 'error'),
  ('starting', 'running'), ('starting', 'stopping'), ('starting', 'missing'), ('starting', 'error'),
  ('running', 'pausing'), ('running', 'stopping'), ('running', 'missing'), ('running', 'error'),
  -- back to running: the pause failed and the VM lives
  ('pausing', 'paused'), ('pausing', 'running'), ('pausing', 'stopping'), ('pausing', 'missing'), ('pausing', 'error'),
  ('paused', 'resuming'), ('paused', 'stopping'), ('paused', 'missing'), ('paused', 'error'),
  -- back to paused: the resume failed and was undone
  ('resuming', 'running'), ('resuming', 'paused'), ('resuming', 'stopping'),
  ('resuming', 'missing'), ('resuming', 'error'),
  ('stopping', 'stopped'), ('stopping', 'missing'), ('stopping', 'error'),
  -- its host is back and said what became of it
  ('missing', 'running'), ('missing', 'paused'), ('missing', 'stopping'), ('missing', 'stopped'), ('missing', 'error')
on conflict do nothing;

create or replace function sandboxes_begin() returns trigger language plpgsql as $$
begin
  if new.status <> 'pending' or new.generation <> 1 then
    raise exception 'sandbox % must begin as pending with generation 1', new.id
      using errcode = '23514', constraint = 'sandboxes_begin_pending', table = 'sandboxes';
  end if;
  -- The lock makes this and the deletion of the team one after the other.
  perform from teams where id = new.team_id and deleted_at is null for share;
  if not found then
    raise exception 'team % is gone', new.team_id
      using errcode = '23514', constraint = 'sandboxes_team_alive', table = 'sandboxes';
  end if;
  return new;
end $$;
create or replace trigger sandboxes_begin before insert on sandboxes for each row execute function sandboxes_begin();

create or replace function sandboxes_change_status() returns trigger language plpgsql as $$
begin
  if new.status = old.status or new.generation <> old.generation + 1 then
    raise exception 'sandbox %: generation % -> % with status % -> %',
      old.id, old.generation, new.generation, old.status, new.status
      using errcode = '23514', constraint = 'sandboxes_generation', table = 'sandboxes';
  end if;
  if not exists (select from sandbox_transitions where from_status = old.status and to_status = new.status) then
    raise exception 'sandbox %: % cannot become %', old.id, old.status, new.status
      using errcode = '23514', constraint = 'sandboxes_transition', table = 'sandboxes';
  end if;
  return new;
end $$;
create or replace trigger sandboxes_change_status before update on sandboxes
  for each row when (new.status <> old.status or new.generation <> old.generation)
  execute function sandboxes_change_status();

create or replace function sandboxes_keep_identity() returns trigger language plpgsql as $$
begin
  raise exception 'sandbox %: id, team and time of creation are fixed, and so is its host once it has one', old.id
    using errcode = '23514', constraint = 'sandboxes_identity', table = 'sandboxes';
end $$;
create or replace trigger sandboxes_identity before update on sandboxes
  for each row when (new.id <> old.id or new.team_id <> old.team_id or new.created_at <> old.created_at
                     or (old.host_id is not null and new.host_id is distinct from old.host_id))
  execute function sandboxes_keep_identity();
