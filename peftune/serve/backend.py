"""What the endpoints need of models and of an engine, which compute in this process or in others."""

from __future__ import annotations

from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Engine
from peftune.serve.engines.group import EngineGroup, GroupBank

ServedModels = AdapterBank | GroupBank
"""A base and its adapters by name."""
TextEngine = Engine | EngineGroup
"""What writes texts."""
