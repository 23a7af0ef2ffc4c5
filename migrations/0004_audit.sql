-- The append-only audit trail.

-- No foreign keys: writing a row never fails the action it tells of, and outlives everything it names.
create table if not exists audit_logs (
  id             uuid primary key default gen_random_uuid(),
  team_id        uuid,                            -- null: of no team, such as a failed login
  actor_type     text not null constraint audit_logs_actor_type check (actor_type in ('user', 'api_key', 'system')),
  actor_id       uuid,
  actor_name     text not null default '',
  resource_type  text not null,
  resource_id    text not null,
  action         text not null,
  scope          text not null constraint audit_logs_scope check (scope in ('team', 'admin')),
  status         text not null constraint audit_logs_status check (status in ('success', 'info', 'warning', 'error')),
  metadata       jsonb not null default '{}'
                 constraint audit_logs_metadata_object check (jsonb_typeof(metadata) = 'object'),
  created_at     timestamptz not null default clock_timestamp(),
  constraint audit_logs_actor check ((actor_type = 'system') = (actor_id is null) or action = 'login_failed')
);
create index if not exists audit_logs_page on audit_logs (team_id, created_at desc, id desc);

create or replace function audit_logs_refuse() returns trigger language plpgsql as $$
begin
  raise exception 'audit_logs is append-only'
    using errcode = '23514', constraint = 'audit_logs_append_only', table = 'audit_logs';
end $$;
create or replace trigger audit_logs_append_only before update or delete or truncate on audit_logs
  for each statement execute function audit_logs_refuse();
