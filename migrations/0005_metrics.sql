-- Samples of sandboxes and teams.

create table if not exists sandbox_metrics (
  sandbox_id  uuid not null constraint sandbox_metrics_sandbox references sandboxes on delete cascade,
  sampled_at  timestamptz not null,
  cpu_pct     real not null,
  mem_bytes   bigint not null,
  disk_bytes  bigint not null,
  constraint sandbox_metrics_pkey primary key (sandbox_id, sampled_at)
);
create index if not exists sandbox_metrics_sampled_at on sandbox_metrics using brin (sampled_at);

create table if not exists team_samples (
  team_id             uuid not null constraint team_samples_team references teams,
  sampled_at          timestamptz not null,
  running_count       integer not null,
  vcpus_reserved      integer not null,
  memory_mb_reserved  bigint not null,
  constraint team_samples_pkey primary key (team_id, sampled_at)
);
create index if not exists team_samples_sampled_at on team_samples using brin (sampled_at);
