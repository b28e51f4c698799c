"""The method inside trainers of others: `zppo.integrations.trl`."""
