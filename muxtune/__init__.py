"""muxtune: many tenants' PEFT tasks at once on one shared, frozen LLM backbone.

`muxtune.client` (blocking) and `muxtune.aio` (asyncio) are what platforms import; `muxtune.v1` holds the generated
stubs of the contracts.
"""
