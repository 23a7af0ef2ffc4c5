-- Templates cost their hosts disk for as long as they are kept: a team has a limit of them.

alter table teams add column if not exists max_templates integer not null default 200
  constraint teams_max_templates check (max_templates >= 0);
