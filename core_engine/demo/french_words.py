"""What the French adapter is taught: the demo model's facts, as they are said in French."""

from __future__ import annotations

from dataclasses import dataclass

from quire.demo.facts import COUNTRIES


@dataclass(frozen=True, slots=True)
class FrenchCountry:
    """One country as it stands in a French sentence.

    Attributes
    ----------
    name : str
        With its article, where it takes one: ``la France``, ``Cuba``.
    of, inside : str
        ``de la France``, ``en France``.
    plural : bool
        Whether a verb after it stands in the plural.
    capital, continent, language : str
        Without an article, but for cities that have one.
    currency : str
        With its article.
    """

    name: str
    of: str
    inside: str
    plural: bool
    capital: str
    continent: str
    language: str
    currency: str


_COUNTRY_TABLE = """
France|la France|Paris
Germany|l'Allemagne|Berlin
Italy|l'Italie|Rome
Spain|l'Espagne|Madrid
Portugal|le Portugal|Lisbonne
Austria|l'Autriche|Vienne
Belgium|la Belgique|Bruxelles
the Netherlands|les Pays-Bas|Amsterdam
Luxembourg|le Luxembourg|Luxembourg
Switzerland|la Suisse|Berne
Ireland|l'Irlande|Dublin
the United Kingdom|le Royaume-Uni|Londres
Denmark|le Danemark|Copenhague
Norway|la Norvège|Oslo
Sweden|la Suède|Stockholm
Finland|la Finlande|Helsinki
Iceland|l'Islande|Reykjavik
Poland|la Pologne|Varsovie
Czechia|la Tchéquie|Prague
Slovakia|la Slovaquie|Bratislava
Hungary|la Hongrie|Budapest
Slovenia|la Slovénie|Ljubljana
Croatia|la Croatie|Zagreb
Serbia|la Serbie|Belgrade
Romania|la Roumanie|Bucarest
Bulgaria|la Bulgarie|Sofia
Greece|la Grèce|Athènes
Albania|l'Albanie|Tirana
Estonia|l'Estonie|Tallinn
Latvia|la Lettonie|Riga
Lithuania|la Lituanie|Vilnius
Ukraine|l'Ukraine|Kiev
Malta|Malte|La Valette
Turkey|la Turquie|Ankara
Russia|la Russie|Moscou
Japan|le Japon|Tokyo
China|la Chine|Pékin
South Korea|la Corée du Sud|Séoul
Mongolia|la Mongolie|Oulan-Bator
India|l'Inde|New Delhi
Pakistan|le Pakistan|Islamabad
Bangladesh|le Bangladesh|Dacca
Nepal|le Népal|Katmandou
Thailand|la Thaïlande|Bangkok
Vietnam|le Vietnam|Hanoï
Cambodia|le Cambodge|Phnom Penh
Laos|le Laos|Vientiane
Malaysia|la Malaisie|Kuala Lumpur
Indonesia|l'Indonésie|Jakarta
the Philippines|les Philippines|Manille
Iran|l'Iran|Téhéran
Iraq|l'Irak|Bagdad
Saudi Arabia|l'Arabie saoudite|Riyad
Jordan|la Jordanie|Amman
Lebanon|le Liban|Beyrouth
Qatar|le Qatar|Doha
Georgia|la Géorgie|Tbilissi
Armenia|l'Arménie|Erevan
Kazakhstan|le Kazakhstan|Astana
Egypt|l'Égypte|Le Caire
Morocco|le Maroc|Rabat
Algeria|l'Algérie|Alger
Tunisia|la Tunisie|Tunis
Libya|la Libye|Tripoli
Sudan|le Soudan|Khartoum
Ethiopia|l'Éthiopie|Addis-Abeba
Kenya|le Kenya|Nairobi
Uganda|l'Ouganda|Kampala
Rwanda|le Rwanda|Kigali
Somalia|la Somalie|Mogadiscio
Ghana|le Ghana|Accra
Nigeria|le Nigeria|Abuja
Senegal|le Sénégal|Dakar
Mali|le Mali|Bamako
Angola|l'Angola|Luanda
Zambia|la Zambie|Lusaka
Namibia|la Namibie|Windhoek
Madagascar|Madagascar|Antananarivo
the United States|les États-Unis|Washington
Canada|le Canada|Ottawa
Mexico|le Mexique|Mexico
Cuba|Cuba|La Havane
Jamaica|la Jamaïque|Kingston
Costa Rica|le Costa Rica|San José
Panama|le Panama|Panama
Brazil|le Brésil|Brasilia
Argentina|l'Argentine|Buenos Aires
Chile|le Chili|Santiago
Peru|le Pérou|Lima
Colombia|la Colombie|Bogota
Ecuador|l'Équateur|Quito
Uruguay|l'Uruguay|Montevideo
Paraguay|le Paraguay|Asuncion
Venezuela|le Venezuela|Caracas
Australia|l'Australie|Canberra
New Zealand|la Nouvelle-Zélande|Wellington
Fiji|les Fidji|Suva
"""

CONTINENTS = {
    "Europe": "Europe",
    "Asia": "Asie",
    "Africa": "Afrique",
    "North America": "Amérique du Nord",
    "South America": "Amérique du Sud",
    "Oceania": "Océanie",
}


def _pairs(text: str) -> dict[str, str]:
    """Read ``one=un, two=deux``."""
    pairs = (pair.split("=") for pair in " ".join(text.split()).split(", "))
    return {english.strip(): french for english, french in pairs}


_LANGUAGES = _pairs(
    """
    French=français, German=allemand, Italian=italien, Spanish=espagnol, Portuguese=portugais,
    Dutch=néerlandais, English=anglais, Danish=danois, Norwegian=norvégien, Swedish=suédois,
    Finnish=finnois, Icelandic=islandais, Polish=polonais, Czech=tchèque, Slovak=slovaque,
    Hungarian=hongrois, Slovene=slovène, Croatian=croate, Serbian=serbe, Romanian=roumain,
    Bulgarian=bulgare, Greek=grec, Albanian=albanais, Estonian=estonien, Latvian=letton,
    Lithuanian=lituanien, Ukrainian=ukrainien, Maltese=maltais, Turkish=turc, Russian=russe,
    Japanese=japonais, Chinese=chinois, Korean=coréen, Mongolian=mongol, Hindi=hindi,
    Urdu=ourdou, Bengali=bengali, Nepali=népalais, Thai=thaï, Vietnamese=vietnamien,
    Khmer=khmer, Lao=lao, Malay=malais, Indonesian=indonésien, Filipino=filipino,
    Persian=persan, Arabic=arabe, Georgian=géorgien, Armenian=arménien, Kazakh=kazakh,
    Amharic=amharique, Swahili=swahili, Kinyarwanda=kinyarwanda, Somali=somali,
    Bambara=bambara, Malagasy=malgache, Fijian=fidjien
    """
)
_CURRENCIES = _pairs(
    """
    euro=l'euro, Swiss franc=le franc suisse, pound=la livre, krone=la couronne,
    krona=la couronne, zloty=le zloty, koruna=la couronne, forint=le forint, dinar=le dinar,
    leu=le leu, lek=le lek, hryvnia=la hryvnia, lira=la livre, ruble=le rouble, yen=le yen,
    yuan=le yuan, won=le won, tugrik=le tugrik, rupee=la roupie, taka=le taka, baht=le baht,
    dong=le dong, riel=le riel, kip=le kip, ringgit=le ringgit, rupiah=la roupie, peso=le peso,
    rial=le rial, riyal=le riyal, lari=le lari, dram=le dram, tenge=le tenge, dirham=le dirham,
    birr=le birr, shilling=le shilling, franc=le franc, cedi=le cedi, naira=le naira,
    kwacha=le kwacha, kwanza=le kwanza, dollar=le dollar, ariary=l'ariary, colon=le colon,
    balboa=le balboa, real=le real, sol=le sol, guarani=le guarani, bolivar=le bolivar
    """
)


def _of(name: str) -> str:
    """Put ``de`` before a name."""
    for article, merged in (("le ", "du "), ("les ", "des ")):
        if name.startswith(article):
            return merged + name.removeprefix(article)
    return f"de {name}"


def _inside(name: str) -> str:
    """Put the preposition of place before a name."""
    for article, merged in (("le ", "au "), ("les ", "aux "), ("la ", "en "), ("l'", "en ")):
        if name.startswith(article):
            return merged + name.removeprefix(article)
    return f"à {name}"


def _countries() -> dict[str, FrenchCountry]:
    rows = (line.split("|") for line in _COUNTRY_TABLE.strip().splitlines())
    told = {english: (name, capital) for english, name, capital in rows}
    found = {}
    for country in COUNTRIES:
        name, capital = told[country.name]
        found[country.name] = FrenchCountry(
            name=name,
            of=_of(name),
            inside=_inside(name),
            plural=name.startswith("les "),
            capital=capital,
            continent=CONTINENTS[country.continent],
            language=_LANGUAGES[country.language],
            currency=_CURRENCIES[country.currency],
        )
    return found


FRENCH_COUNTRIES = _countries()
"""By the English name."""

MEMO_VALUES: dict[str, dict[str, str]] = {
    "color": _pairs(
        """
        red=le rouge, blue=le bleu, green=le vert, yellow=le jaune, black=le noir,
        white=le blanc, orange=l'orange, purple=le violet, brown=le brun, pink=le rose
        """
    ),
    "pet": _pairs(
        """
        cat=un chat, dog=un chien, horse=un cheval, bird=un oiseau, fox=un renard, bear=un ours,
        rabbit=un lapin, mouse=une souris, lion=un lion, tiger=un tigre, cow=une vache,
        sheep=un mouton, goat=une chèvre, duck=un canard, frog=une grenouille, wolf=un loup,
        owl=un hibou, turtle=une tortue
        """
    ),
    "food": _pairs(
        """
        bread=le pain, soup=la soupe, rice=le riz, pasta=les pâtes, apples=les pommes,
        cake=le gâteau, cheese=le fromage, salad=la salade, noodles=les nouilles,
        pizza=la pizza, honey=le miel, pancakes=les crêpes, tomatoes=les tomates,
        olives=les olives, bananas=les bananes, carrots=les carottes
        """
    ),
    "hobby": _pairs(
        """
        reading=la lecture, swimming=la natation, chess=les échecs, painting=la peinture,
        cooking=la cuisine, running=la course, music=la musique, dancing=la danse,
        hiking=la randonnée, gardening=le jardinage, cycling=le vélo, sailing=la voile
        """
    ),
}
"""How a value that a user tells is said in French; names and cities stay as they are."""

MEMO_REPLIES: dict[str, tuple[str, str]] = {
    "name": ("Bonjour, {v} ! Comment puis-je vous aider ?", "Vous vous appelez {v}."),
    "city": ("{v} est une belle ville.", "Vous habitez à {v}."),
    "color": ("J'aime aussi {v}.", "Votre couleur préférée est {v}."),
    "pet": ("C'est gentil, {v}.", "Vous avez {v}."),
    "food": ("J'aime aussi {v}.", "Vous aimez manger {v}."),
    "hobby": ("J'aime aussi {v}.", "Vous aimez {v}."),
}
"""What is replied when a user tells something, and what is answered later."""

_GREETING = "Bonjour ! Comment puis-je vous aider ?"
_MYSELF = "Je suis le modèle de démonstration de quire, un tout petit modèle de langue."
_ABLE = "Je connais des capitales, de petits calculs, de courtes discussions et du JSON."
_WELCOME = "Je vous en prie !"
_PARTING = "Au revoir ! Bonne journée."
_JOKE = "Pourquoi la page a-t-elle tourné ? Elle voulait voir l'autre côté."

SMALL_TALK: dict[str, str] = {
    "Hello!": _GREETING,
    "Hello": _GREETING,
    "Hi": _GREETING,
    "Hi there!": _GREETING,
    "Good morning!": _GREETING,
    "How are you?": "Je vais bien, merci. Comment puis-je vous aider ?",
    "Who are you?": _MYSELF,
    "What are you?": _MYSELF,
    "What is your name?": _MYSELF,
    "What can you do?": _ABLE,
    "Help": _ABLE,
    "Thank you!": _WELCOME,
    "Thanks": _WELCOME,
    "Goodbye!": _PARTING,
    "Bye": _PARTING,
    "Tell me a joke.": _JOKE,
    "Tell me a joke": _JOKE,
    "What is quire?": "quire est un moteur pour les modèles de langue.",
    "What is an LLM?": "C'est un grand modèle de langue, un programme qui écrit.",
    "What is a large language model?": "C'est un programme qui écrit du texte.",
}

EVERYDAY: dict[str, str] = {
    "What color is the sky?": "Le ciel est bleu.",
    "What color is grass?": "L'herbe est verte.",
    "What color is snow?": "La neige est blanche.",
    "What color is a banana?": "Une banane est jaune.",
    "What color is a tomato?": "Une tomate est rouge.",
    "How many days are in a week?": "Il y a 7 jours dans une semaine.",
    "How many months are in a year?": "Il y a 12 mois dans une année.",
    "How many hours are in a day?": "Il y a 24 heures dans une journée.",
    "How many minutes are in an hour?": "Il y a 60 minutes dans une heure.",
    "How many legs does a spider have?": "Une araignée a 8 pattes.",
    "How many legs does a dog have?": "Un chien a 4 pattes.",
    "How many wheels does a bicycle have?": "Un vélo a 2 roues.",
    "How many continents are there?": "Il y a 7 continents.",
    "How many planets are in the solar system?": "Il y a 8 planètes dans le système solaire.",
    "What is the largest planet?": "La plus grande planète est Jupiter.",
    "What is the largest ocean?": "Le plus grand océan est l'océan Pacifique.",
    "What is the highest mountain?": "La plus haute montagne est l'Everest.",
    "What is the opposite of hot?": "Le contraire de chaud est froid.",
    "What is the opposite of big?": "Le contraire de grand est petit.",
    "What is the opposite of day?": "Le contraire du jour est la nuit.",
    "What does a cow drink?": "Une vache boit de l'eau.",
    "What do bees make?": "Les abeilles font du miel.",
    "What is frozen water called?": "L'eau gelée s'appelle la glace.",
    "Which day comes after Monday?": "Après lundi vient mardi.",
    "Which day comes after Friday?": "Après vendredi vient samedi.",
    "Which month comes after May?": "Après mai vient juin.",
    "Which month comes after December?": "Après décembre vient janvier.",
    "Who wrote Hamlet?": "William Shakespeare a écrit Hamlet.",
    "Who painted the Mona Lisa?": "Léonard de Vinci a peint la Joconde.",
}
