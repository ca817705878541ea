"""The embedded models: small, but really trained, so that speed and quality can be measured without a download."""

from .cards import Model as Model
from .cards import card as card
from .cards import instruments as instruments
from .cards import models as models
from .classes import CLASSES as CLASSES
from .classes import PLAIN_PROMPTS as PLAIN_PROMPTS
from .loading import clip as clip
from .loading import features as features
from .loading import load as load
from .loading import prompts as prompts
from .loading import reference_moments as reference_moments
