"""Tell Django about the models. It makes no tables: `worker.django.apps` does."""

from django.db import migrations, models


class Migration(migrations.Migration):  # type: ignore[misc]  # Django has no annotations
    """The two models that Django does not manage."""

    initial = True
    dependencies: list[tuple[str, str]] = []
    operations = [
        migrations.CreateModel(
            name="Job",
            fields=[
                ("id", models.BigIntegerField(primary_key=True, serialize=False)),
                ("account", models.CharField(max_length=64)),
                ("remote_id", models.CharField(max_length=128)),
                ("kind", models.CharField(max_length=64)),
                ("status", models.CharField(max_length=16)),
                ("reference", models.CharField(max_length=255, null=True)),
                ("polls", models.IntegerField()),
                ("eta", models.FloatField(null=True)),
                ("submitted_at", models.DateTimeField()),
                ("ready_at", models.DateTimeField(null=True)),
                ("completed_at", models.DateTimeField(null=True)),
                ("deadline_at", models.DateTimeField()),
                ("error_code", models.CharField(max_length=32, null=True)),
                ("error_message", models.TextField(null=True)),
            ],
            options={"db_table": "fetch_jobs", "managed": False},
        ),
        migrations.CreateModel(
            name="Output",
            fields=[
                ("id", models.BigIntegerField(primary_key=True, serialize=False)),
                ("position", models.IntegerField()),
                ("url", models.TextField()),
                ("status", models.CharField(max_length=16)),
                ("location", models.TextField(null=True)),
                ("size_bytes", models.BigIntegerField(null=True)),
                ("sha256", models.CharField(max_length=64, null=True)),
                ("media_type", models.CharField(max_length=100, null=True)),
                ("attempts", models.IntegerField()),
                ("error_code", models.CharField(max_length=32, null=True)),
                ("error_message", models.TextField(null=True)),
                (
                    "job",
                    models.ForeignKey(on_delete=models.DO_NOTHING, related_name="outputs", to="fetch_worker.job"),
                ),
            ],
            options={"db_table": "fetch_outputs", "managed": False},
        ),
    ]
