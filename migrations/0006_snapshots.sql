-- Snapshots: the size of their disk, and hosts that lost their copy.

alter table templates add column if not exists disk_mb integer constraint templates_disk_mb check (disk_mb > 0);

alter table template_hosts add column if not exists lost_at timestamptz;
