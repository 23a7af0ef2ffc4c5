-- Hosts that are being deleted with their sandboxes: whoever began may die, anybody finishes.

create table if not exists host_removals (
  host_id  uuid constraint host_removals_pkey primary key
           constraint host_removals_host references hosts on delete cascade,
  due_at   timestamptz not null
);
create index if not exists host_removals_due_at on host_removals (due_at);
